"""The sampler's decode step as a CUDA graph (--graph). You may skip this file. Read the plain form
first: the loop of Sampler.sample in model.py.

A step launches over a thousand kernels. The CPU may need longer to launch them than the GPU to
compute them. A CUDA graph records the kernels of one step and launches them all at once. It repeats
the recorded shapes, addresses and numbers. So B and S are rounded up to a bucket, each with its own
graph. Finished rows stay until the others fit a smaller bucket. Whatever changes lies in tensors
that are made once, and the step never reads its results.

Memory for 96 rows of 4,096 slots at 0.5B, counted on fake tensors: 7 MB of tables, and one pool of
0.2 GB for the largest step, which the trainer cannot use. The graphs, at most 160 per temperature,
add more; this has not been measured. NO CARD HAS RUN THE CAPTURE YET. A CPU just calls the step.
"""
import torch

from data.tokenizer import Tokenizer
from model import CachePass, Sampler, Transformer, draw

KEYS = 256  # S is a multiple of it, or the length of the cache


class GraphSampler(Sampler):
    """A Sampler that replays its decode steps. Its results are the same, up to rounding."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, rows: int, slots: int):
        super().__init__(model, tokenizer, rows, slots)
        float_type = torch.promote_types(model.dtype, torch.float32)

        def zeros(*shape, dtype=torch.long):
            return torch.zeros(shape, dtype=dtype, device=model.device)

        # A line per conversation of a sample() call, and one for the rows without a conversation.
        self.spare = rows  # its limit stays 0, so these rows are always done
        self.limit_of = zeros(rows + 1)
        self.uniform_of = zeros(rows + 1, slots, dtype=float_type)
        self.ids = zeros(rows + 1, slots)
        self.logprobs = zeros(rows + 1, slots, dtype=float_type)
        self.count = zeros(rows + 1)  # of new tokens
        self.index = zeros(rows)  # cache row -> its line
        self.states = zeros(rows, model.config.hidden_size, dtype=model.dtype)
        self.done = zeros(rows, dtype=torch.bool)
        self.step = zeros(1)
        self.captures = model.device.type == "cuda"
        self.graphs: dict[tuple, torch.cuda.CUDAGraph] = {}  # by B, S and temperature
        self.pool = None  # of all graphs, because no activation outlives its step

    @torch.inference_mode()
    def sample(self, conversations, limits, uniforms, temperature=1.0):  # see Sampler.sample
        device = self.model.device
        n = len(conversations)
        longest = max(limits)
        for c, limit in zip(conversations, limits, strict=True):
            need = c.filled + len(c.pending) + limit - 1
            assert c.pending and limit > 0 and need <= self.slots, (
                f"limit {limit}: KV cache of {self.slots} slots, {need} needed")
        self.limit_of[:n] = torch.tensor(limits, device=device)
        self.uniform_of[:n, :longest] = torch.as_tensor(uniforms[:, :longest], device=device)
        self.count.zero_()
        self.step.zero_()
        self.states[:n] = self._prefill(conversations)
        order = {c: i for i, c in enumerate(conversations)}
        self.index.fill_(self.spare)
        self.index[:n] = torch.tensor([order[c] for c in self.rows[:n]], device=device)

        width = self.cache.k.shape[3]
        filled = self.cache.longest
        active = n
        for _ in range(longest):
            B = self._bucket(active)
            filled = min(filled + 1, width)  # an upper bound, as cache.longest is
            self._run(B, min(filled + -filled % KEYS, width), temperature)
            done = self.done[:active].tolist()  # here the host waits for the device, once per step
            left = done.count(False)
            if left == 0:
                break
            if self._bucket(left) < B:
                self.cache.longest = filled
                self._remove(done, self.states, self.index)
                self.index[left:] = self.spare
                active = left

        results = []
        tables = (self.ids[:n, :longest], self.logprobs[:n, :longest], self.count[:n])
        rows = zip(*[table.tolist() for table in tables], strict=True)
        for c, (row, scores, count) in zip(conversations, rows, strict=True):
            c.pending = row[count - 1:count]
            c.filled += count - 1
            results.append((row[:count], scores[:count]))
        return results

    def _bucket(self, active: int) -> int:
        """The rows of a step with so many active rows: 1, 2, 4, 8 or a multiple of 16."""
        B = active + -active % 16 if active > 8 else 1 << (active - 1).bit_length()
        return min(B, self.capacity)

    def _run(self, *key) -> None:  # B, S, temperature
        """One step. A bucket's first step is called, to set up the libraries, then recorded."""
        if key in self.graphs:
            return self.graphs[key].replay()
        self._step(*key)
        if self.captures:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):  # computes nothing
                self._step(*key)
            self.pool = graph.pool()
            self.graphs[key] = graph

    def _step(self, B: int, S: int, temperature: float) -> None:
        """The first B rows draw a token each and feed it; they see the first S slots."""
        index = self.index[:B]
        uniform = self.uniform_of[index, self.step]
        new, logprob = draw(self.model.head(self.states[:B]), uniform, temperature)  # (B,)
        self.ids[index, self.step] = new
        self.logprobs[index, self.step] = logprob
        self.count[index] += 1
        self.step += 1
        # torch.isin would sort if there were many stop ids, and then the host would wait.
        done = (new[:, None] == self.stop).any(1) | (self.limit_of[index] <= self.step)
        self.done[:B] = done
        index.masked_fill_(done, self.spare)
        self.cache.longest = S - 1  # the pass counts one more
        past = CachePass(self.cache, (~done).long(), 1)
        # A row that is done writes a key behind its tokens. A full row has no slot there and loses
        # its last key, but no pass reads such a row again.
        past.slots.clamp_(max=self.cache.k.shape[3] - 1)
        self.states[:B] = self.model(new[:, None], past)[:, 0]
        past.close()


def make_sampler(config, model: Transformer, tokenizer: Tokenizer, rows: int, slots: int
                 ) -> Sampler:
    """The sampler of a program: with --graph a GraphSampler, else the plain one."""
    return (GraphSampler if config.graph else Sampler)(model, tokenizer, rows, slots)
