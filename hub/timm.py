"""A plain ViT's weights under timm's names, for those whose code builds on it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from swath.backbones.vit import ViT
from swath.hub.load import Loaded

FILE = "timm_model.safetensors"


def timm_weights(loaded: Loaded) -> dict[str, Tensor] | None:
    """Parameters of timm's VisionTransformer, without a classifier, at the size that the backbone was trained at; None for any
    other backbone, and for one with a context encoding, which timm has not.

    Ours have timm's names; positions are a table there, with a row of zeros for the class token, which has none here.
    """
    backbone = loaded.backbone
    if not isinstance(backbone, ViT) or backbone.context is not None:
        return None
    ours = {name: tensor for name, tensor in backbone.state_dict().items() if name != "pos_embed"}
    rows, columns = backbone.grid(*loaded.size)[2:]
    # the registry's decorator hides the class from the type checker
    table_nd = backbone.positions(rows, columns, backbone.cls_token.device).to(torch.float32)  # pyright: ignore[reportCallIssue]
    return ours | {"pos_embed": F.pad(table_nd, (0, 0, 1, 0))[None]}


def timm_note(loaded: Loaded) -> str:
    """Section of the card that says how timm loads the file."""
    backbone = loaded.backbone
    assert isinstance(backbone, ViT)
    config = backbone.config
    pool = {"mean": "avg", "class": "token"}.get(config.pool, "")
    lacking = "" if pool else "\nIt gives tokens, since timm has no pooling by texture.\n"
    return f"""
## In timm

`{FILE}` holds the same weights under timm's names. Normalise images as the image processor does.

```python
import timm

model = timm.create_model(
    "vit_base_patch16_224", num_classes=0, img_size={loaded.size}, in_chans={config.bands}, patch_size={config.patch},
    embed_dim={config.width}, depth={config.depth}, num_heads={config.heads}, mlp_ratio={config.mlp_ratio:g},
    global_pool="{pool}", fc_norm=False, checkpoint_path="{FILE}",
)
```
{lacking}"""
