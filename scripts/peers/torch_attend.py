"""torch's attention on the tensors that heed has.

Setup: threads, tensors {q, k, v: shape}, whose f32 values follow.
Run: dtype (f32, bf16), mask (full, causal, streaming, blocks), sink and window for streaming; answered with seconds, or,
where the request lists rows, with their outputs o [B, Hq, rows, Dv] as one list. With backward, the gradients of q, k and
v are computed too.
Or blocks: a shape [Hq, N, M / 64], whose u8 values follow: whether a query sees the 64 keys of a block, those that come
after it aside. The table serves the runs whose mask is blocks.

full and causal are scaled_dot_product_attention. The others are FlexAttention, compiled: whole blocks of 128 × 128 that
nobody sees are skipped, those that everybody sees go untested. A mask's block table is made and compiled before it is timed.
"""
import os
import time

import peer

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no processes of the compiler's own that stay
BLOCK = 128


class Attend:
    def __init__(self, setup, channel):
        import torch

        self.torch = torch
        self.version = torch.__version__.split("+")[0]
        torch.set_num_threads(setup["threads"])
        torch.set_grad_enabled(False)
        names = {name: channel.tensor(torch, shape, torch.float32) for name, shape in setup["tensors"].items()}
        self.tensors = {"f32": [names[n] for n in "qkv"]}
        self.tensors["bf16"] = [x.to(torch.bfloat16) for x in self.tensors["f32"]]
        self.channel, self.table, self.masks, self.compiled, self.dout = channel, None, {}, None, None

    def run(self, request):
        if "blocks" in request:
            self.table = self.channel.tensor(self.torch, request["blocks"], self.torch.uint8)
            self.masks.pop(("blocks", None, None), None)
            return {}
        q, k, v = self.tensors[request["dtype"]]
        attend = self.attention(request, q, k)
        if "rows" in request:
            rows = self.torch.tensor(request["rows"])
            return {"o": attend(q, k, v)[:, :, rows].float().flatten().tolist()}
        if request.get("backward"):
            return {"seconds": self.backward(attend, q, k, v)}
        start = time.perf_counter()
        attend(q, k, v)
        return {"seconds": time.perf_counter() - start}

    def backward(self, attend, q, k, v):
        with self.torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            if self.dout is None or self.dout.dtype != q.dtype:
                self.dout = self.torch.randn((*q.shape[:3], v.shape[3]), dtype=q.dtype)
            start = time.perf_counter()
            attend(*leaves).backward(self.dout)
            return time.perf_counter() - start

    def attention(self, request, q, k):
        grouped = q.shape[1] != k.shape[1]
        if request["mask"] in ("full", "causal"):
            dense = self.torch.nn.functional.scaled_dot_product_attention
            causal = request["mask"] == "causal"
            return lambda q, k, v: dense(q, k, v, is_causal=causal, enable_gqa=grouped)

        from torch.nn.attention.flex_attention import flex_attention

        key = (request["mask"], request.get("sink"), request.get("window"))
        if key not in self.masks:
            self.masks[key] = self.streaming(q, *key[1:]) if key[0] == "streaming" else self.blocks(q)
        if self.compiled is None:
            self.torch._dynamo.config.recompile_limit = 64  # one a mask and number type
            self.compiled = self.torch.compile(flex_attention, dynamic=False)
        mask, compiled = self.masks[key], self.compiled
        return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=grouped)

    # The 128 × 128 blocks that somebody sees, and of those the ones that everybody sees.
    def block_mask(self, some, all_, mask_mod, n):
        from torch.nn.attention.flex_attention import BlockMask

        torch = self.torch

        def listed(chosen):
            count = chosen.sum(-1).to(torch.int32)
            order = torch.argsort(chosen.to(torch.int8), dim=-1, descending=True, stable=True).to(torch.int32)
            return count, order.contiguous()

        return BlockMask.from_kv_blocks(
            *listed(some & ~all_), *listed(some & all_), BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(n, n)
        )

    def streaming(self, q, sink, window):
        torch, n = self.torch, q.shape[2]
        first = torch.arange(0, n, BLOCK)
        last = torch.clamp(first + BLOCK, max=n) - 1
        q0, q1, k0, k1 = first[:, None], last[:, None], first[None], last[None]
        some = (k0 <= q1) & ((k0 < sink) | (k1 > q0 - window))
        all_ = (k1 <= q0) & ((k1 < sink) | (k0 > q1 - window))

        def visible(b, h, i, j):
            return (j <= i) & ((j < sink) | (j > i - window))

        return self.block_mask(some[None, None], all_[None, None], visible, n)

    def blocks(self, q):
        torch, n, table = self.torch, q.shape[2], self.table.bool()
        heads, per = q.shape[1], BLOCK // 64
        tiles = table.reshape(heads, n // BLOCK, BLOCK, n // BLOCK, per)
        at = torch.arange(n // BLOCK)
        some = tiles.any(4).any(2)
        all_ = tiles.all(4).all(2) & (at[None] < at[:, None])  # on the diagonal some keys come after their query

        def visible(b, h, i, j):
            return (j <= i) & table[h, i, j // 64]

        return self.block_mask(some[None], all_[None], visible, n)


if __name__ == "__main__":
    peer.serve(Attend)
