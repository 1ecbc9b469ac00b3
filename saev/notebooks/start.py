"""From a folder of pictures to latents, in ten lines. Two more show all of them in a notebook.

Run it, or step through its cells: editors that know `# %%` (VS Code, PyCharm, Spyder; Jupyter with
jupytext) show them.
"""

# %% Record what a DINOv2 says of the pictures. Its weights come from the model hub.
from pathlib import Path

import saev
from saev.config import (
    ImgFolder,
    InferenceConfig,
    LoaderConfig,
    SaeConfig,
    ShardsConfig,
    TrainConfig,
)
from saev.shards import Shards, extract

pictures = ImgFolder(root=str(Path.home() / "pictures"))
recording = ShardsConfig(
    family="dinov2", ckpt="vits14", image_size=224, layers=(-1,), data=pictures
)
shards = Shards.open(extract.run(recording))

# %% Train an SAE on it: 2 x 384 latents, of which 32 fire for each patch. Ten epochs.
data = LoaderConfig(shards=shards.url)
(run,) = saev.train.run(TrainConfig(train_data=data, sae=SaeConfig(exp_factor=2)))
sae = saev.load_sae(run)

# %% The latents of the first picture. Token 0 is the class token, the others are patches.
acts = shards.read(shard=0, layer=None, start=0, stop=1)[0, 1:]
latents = sae.encode(acts.float()).acts
print(sae, latents.shape)  # [patches, latents]
print("strongest on this picture:", latents.amax(0).topk(5).indices.tolist())

# %% Measure it on all pictures, and look at all latents in a frame below this cell.
saev.inference.run(InferenceConfig(run=run))
saev.show(run)
