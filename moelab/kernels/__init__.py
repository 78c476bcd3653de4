"""The kernels, one file each with its launcher. Importing this package fixes how Triton runs (see moelab.runtime)."""

from moelab import runtime

runtime.prepare_triton()
