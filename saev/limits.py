"""Constants of stages that `saev size` also needs. It must not import torch."""

VAL_FRACTION = 0.1
"""Share of examples kept for evaluation when training and evaluation name the same folder."""
N_RESUME_POINTS = 2
"""Resume points of a group that are kept."""
INDEX_BYTES_PER_TOKEN = 32
"""Most bytes of a token in a loader's window, without its vector, while the index is made: its
position in the order and in the window, its example, and its number in the example."""
GPU_CHUNK_BYTES = 2 << 30
"""Bytes of the largest temporary of a training step on a GPU: pre-activations or reconstructions
of a chunk of rows."""
GROUP_BYTES = 8 << 30
"""Most bytes that the SAEs of a group take while they are measured together. More SAEs make more
groups, each of which reads the activations once."""
ITEM_TOKENS = 4_000_000
"""Tokens, times the number of SAEs that are run over them, that are worth a pod: it has to load
the SAEs for them."""
PIECE_ENTRIES = 1 << 21
"""Sparse codes of an SAE, of 8 bytes each, that are gathered before they are turned into columns,
added up and written. Sums are made per piece, so that another number changes their last digits."""
SPREAD_EXAMPLES = 12
"""Examples kept per latent that are a random sample of those on which it fires."""
HISTOGRAM_BINS = 256
"""Bins of the histograms of a latent's values."""
EMBEDDED_IMAGES = 1 << 16
"""Images of which `saev inference` keeps an embedding, at most."""
