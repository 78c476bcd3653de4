"""The fused MoE layer made of this project's kernels; `moelab.implementations` names the ways."""
