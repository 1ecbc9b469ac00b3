"""Differentiable operations with gradients written by hand.

Each is a ``torch.autograd.Function`` that does what a few lines of torch would do, with less memory
or fewer operations. tests/nn/test_kernels.py has these lines and compares values and gradients.

    sparse.py      codes of the selected latents: their encoder, and their decoder
    dense.py       decoder of dense latents, block by block; ReLU with L1, JumpReLU with L0
    errors.py      squared errors of nested reconstructions
"""
