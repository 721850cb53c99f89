"""How stages run (device, precision, offload, compile, fast convolutions), never what they compute."""
