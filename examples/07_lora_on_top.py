"""Train LoRA adapters on a recovered checkpoint: RECOVERED TEXT_FILE OUT; needs `pip install peft`.

The layers that are left have their usual names. An operator is a linear module `ghost.linear`, and can have
an adapter too.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import ghoststream  # noqa: F401 - transformers then knows recovered checkpoints

STEPS, WINDOWS, LENGTH = 8, 8, 64


def main(folder: str, text: str, out: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(Path(text).read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][0]
    windows = ids[: WINDOWS * LENGTH].reshape(WINDOWS, LENGTH)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lora = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "ghost.linear"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, lora)
    optimiser = torch.optim.AdamW((one for one in model.parameters() if one.requires_grad), lr=1e-3)
    for step in range(STEPS):
        loss = model(input_ids=windows, labels=windows).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        print(f"step {step}: loss {loss.item():.4f}")
    model.save_pretrained(out)
    adapted = sorted({name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name})
    print(
        f"{len(adapted)} adapters in {out}, {sum('ghost' in name for name in adapted)} of them on operators"
    )


if __name__ == "__main__":
    main(*sys.argv[1:4])
