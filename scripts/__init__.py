"""Programs for working on audioldm2 from a checkout: tests, benchmarks, training of the tiny checkpoint."""
