#!/usr/bin/env python3
"""Long attention made cheap, in PyTorch: what a sparse mechanism decides, what it gives, and a few steps of training.

pip install torch && pip install .          # in a virtual environment, from heed's folder
python examples/python_attend.py
"""

import time

import heed
import torch

torch.manual_seed(0)
B, HQ, HK, N, D = 1, 4, 2, 4096, 64
q = torch.randn(B, HQ, N, D)
k, v = torch.randn(B, HK, N, D), torch.randn(B, HK, N, D)

# Who would attend to whom, before anything is computed.
plan = heed.plan(q, k, "moba", block=64, top_k=8)
print(plan)
plan.plot("moba.png", max_pixels=512)

# The same call on tensors (or NumPy arrays), beside dense attention.
for mechanism, params in [("dense", {}), ("moba", dict(block=64, top_k=8)), ("streaming", dict(sink=4, window=512))]:
    heed.attend(q, k, v, mechanism, causal=True, **params)  # a first call warms up
    start = time.perf_counter()
    heed.attend(q, k, v, mechanism, causal=True, **params)
    print(f"{mechanism:10} {1000 * (time.perf_counter() - start):7.1f} ms  {heed.describe(mechanism).paper}")


# Gradients: a layer that must copy what stood 100 tokens earlier, under a mechanism that sees no further than 128.
class Layer(torch.nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return self.out(heed.attend(q, k, v, "streaming", sink=0, window=128).transpose(1, 2).flatten(2))


width, far = 64, 100
where = torch.arange(512)[:, None] / 40 ** (torch.arange(width // 4) / (width // 4))
places = torch.cat([where.sin(), where.cos()], -1)  # what tells the layer where a token stands
layer = Layer(width, 2)
optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3)
for step in range(201):
    said = torch.randn(4, 512, width // 2)
    x = torch.cat([said, places.expand(4, -1, -1)], -1)
    loss = (layer(x)[:, far:, : width // 2] - said[:, :-far]).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0:
        print(f"step {step:3}  loss {loss.item():.3f}")
