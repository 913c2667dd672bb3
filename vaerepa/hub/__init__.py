"""The Hub: write access, pushes, uploads in the background, and download of checkpoints to go on from."""
