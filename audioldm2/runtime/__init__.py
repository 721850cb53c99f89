"""How stages run (precision, offload, compile), never what they compute."""
