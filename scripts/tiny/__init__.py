"""How the tiny checkpoint (audioldm2/tiny) is made. README.md beside this file gives the reading order."""
