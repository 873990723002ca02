"""Triton kernels, attention, FP8 and fused products, each beside its definition in plain PyTorch."""
