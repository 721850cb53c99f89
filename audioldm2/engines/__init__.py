"""Where a batch is generated: each engine takes groups and gives back their sounds, in any order."""
