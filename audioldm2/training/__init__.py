"""Training: the loop, the losses and the data that every training shares."""
