"""The Hub: who may write, what goes up, uploads in the background, and checkpoints fetched to go on from."""
