"""llama.cpp, as llama-cpp-python brings it, on the GGUF file that heed runs.

Setup: threads, model, context. Run: ids, steps. steps = 0: seconds of reading the ids, in steps of 512 tokens, the logits of
the last one computed; else seconds of feeding the last `steps` ids one by one after the others, as llama-bench does.
"""
import time

import peer

STEP = 512


class Model:
    def __init__(self, setup, channel):
        import llama_cpp

        self.c = c = llama_cpp
        self.version = llama_cpp.__version__
        c.llama_backend_init()
        parameters = c.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self.model = c.llama_model_load_from_file(setup["model"].encode(), parameters)
        if not self.model:
            raise RuntimeError(f"{setup['model']} could not be loaded")
        options = c.llama_context_default_params()
        options.n_ctx = setup["context"]
        options.n_batch = options.n_ubatch = STEP
        options.n_threads = options.n_threads_batch = setup["threads"]
        self.context = c.llama_init_from_model(self.model, options)
        if not self.context:
            raise RuntimeError("no context could be made")
        self.memory = c.llama_get_memory(self.context)
        self.held = []

    def feed(self, ids, step):
        for at in range(0, len(ids), step):
            part = ids[at : at + step]
            tokens = (self.c.llama_token * len(part))(*part)
            if self.c.llama_decode(self.context, self.c.llama_batch_get_one(tokens, len(part))) != 0:
                raise RuntimeError(f"llama_decode failed at token {at} of {len(ids)}")
        self.c.llama_synchronize(self.context)

    def run(self, request):
        ids, steps = request["ids"], request["steps"]
        if steps == 0:
            self.c.llama_memory_clear(self.memory, False)
            self.held = []
            start = time.perf_counter()
            self.feed(ids, STEP)
            return {"seconds": time.perf_counter() - start}
        # The context is read once; later runs only forget what they generated.
        before = ids[:-steps]
        if self.held != before:
            self.c.llama_memory_clear(self.memory, False)
            self.feed(before, STEP)
            self.held = before
        self.c.llama_memory_seq_rm(self.memory, 0, len(before), -1)
        start = time.perf_counter()
        self.feed(ids[-steps:], 1)
        return {"seconds": time.perf_counter() - start}


if __name__ == "__main__":
    peer.serve(Model)
