"""Triton kernels, attention, FP8 and fused products, each with its definition in plain PyTorch."""
