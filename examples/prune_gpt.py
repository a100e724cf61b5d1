"""Prune a language model of Hugging Face's at initialization, and train it; seconds.

A tiny GPT-2 learns the characters of this file. ``losses=`` runs any model on any
batch; here it says that the loss is that of the next token.

    python examples/prune_gpt.py
"""

from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import fisherprune as fp
from fisherprune.losses import next_token

SPARSITY, STEPS, LENGTH = 0.7, 30, 64


def batch_of(text):
    """Return all windows of a text as a batch: every character is a token."""
    tokens = torch.tensor([min(ord(c), 127) for c in text])
    windows = tokens.unfold(0, LENGTH, LENGTH // 2)
    return {"input_ids": windows, "labels": windows}


def main():
    """Return the model, its masks, and the loss before and after training."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=128,
        n_positions=LENGTH,
        n_embd=48,
        n_layer=2,
        n_head=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config)
    batch = batch_of(Path(__file__).read_text(encoding="utf-8"))
    masks = fp.prune(model, [batch], "fts", SPARSITY, "erk", losses=next_token)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    masks.hold(model, optimizer)
    losses = []
    for _ in range(STEPS):
        loss = next_token(model, batch).mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, masks, losses[0], losses[-1]


if __name__ == "__main__":
    model, masks, before, after = main()
    for name, mask in masks.items():
        print(f"{name:40} {float(mask.float().mean()):6.1%} kept")
    print(f"loss of a character: {before:.2f} before, {after:.2f} after training")
