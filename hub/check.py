"""Run by `swath export` in a fresh process without swath: does the folder load, and give the features that it should?

    python check.py FOLDER THREADS

Beside FOLDER lies expected.safetensors with `raw` images and what the source made of them.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel


def main(folder: Path, threads: int) -> None:
    torch.set_num_threads(threads)  # sums are cut by thread, so equality to the bit needs the same number
    expected = load_file(folder.parent / "expected.safetensors")
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    made = {"pixel_values": processor(expected["raw"], scale=1.0)["pixel_values"]}
    with torch.inference_mode():
        output = model(made["pixel_values"], output_hidden_states=True)
    made |= {"last_hidden_state": output.last_hidden_state, "pooler_output": output.pooler_output}
    for name, tensor in made.items():
        if not torch.equal(tensor, expected[name]):
            largest = (tensor - expected[name]).abs().max().item() if tensor.shape == expected[name].shape else "shape"
            sys.exit(f"{name} is not what the source gives (largest difference: {largest})")
    if len(output.hidden_states) != model.config.num_hidden_layers + 1:
        sys.exit(f"{len(output.hidden_states)} hidden states for {model.config.num_hidden_layers} blocks")
    if "swath" in sys.modules:
        sys.exit("the exported code imports swath")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
