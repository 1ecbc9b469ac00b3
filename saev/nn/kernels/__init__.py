"""Operations with gradients written by hand.

Each replaces a few lines of torch, with less memory or fewer operations. tests/nn/test_kernels.py
compares values and gradients with these lines.

    sparse.py      codes of the selected latents: their decoder, and sums for gradients of weights
    dense.py       decoder of dense latents, block by block; ReLU with L1, JumpReLU with L0
    errors.py      squared errors of nested reconstructions
"""
