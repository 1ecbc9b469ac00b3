"""The training step's kernels for a GPU, in Triton. Import it on a machine that has Triton only.

Each kernel has a counterpart in torch: under the same name in :mod:`saev.nn.kernels.sparse`, or
with ``_reference`` in its module. tests/nn/test_triton.py compares the two in Triton's interpreter,
and compiles the kernels for GPUs that are not there. :mod:`saev.nn.kernels.choice` compares them
once more where they will run.

    select.py      the k largest of each row
    decode.py      sparse decoder with its errors and the gradient of the codes
    bags.py        weighted sums of rows: gradients of encoder and decoder
    upkeep.py      gradients along the decoder's rows, Adam, normalised rows

Sums have a fixed order and there are no atomics, so a GPU repeats itself bit for bit.
"""
