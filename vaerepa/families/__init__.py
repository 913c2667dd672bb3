"""Architectures: one file each. A family knows its sizes, blocks, condition, time scale and stock pipeline."""

from vaerepa.families import dit

SIZES_HELP = f"SiT-{{{','.join(dit.SIZES)}}}/{{{','.join(map(str, dit.PATCH_SIZES))}}}"
