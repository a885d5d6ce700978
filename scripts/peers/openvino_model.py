"""OpenVINO GenAI on the GGUF file that heed runs.

Setup: threads, model, mode (dense, trishape, xattention). Run: ids, steps. steps = 0: seconds of reading the ids up to the
first token; else seconds of generating `steps` tokens after all ids but the last `steps`, by the pipeline's own clock.

The sparse modes apply to prompts only, with the package's own defaults. Prefix caching is off: a prompt that was read before
would not be read again.
"""
import peer


class Model:
    def __init__(self, setup, channel):
        import numpy
        import openvino
        import openvino_genai as genai

        self.numpy, self.openvino, self.genai = numpy, openvino, genai
        self.version = genai.__version__.split("-")[0]
        scheduler = genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_batched_tokens = 1 << 20
        if setup["mode"] != "dense":
            scheduler.use_sparse_attention = True
            scheduler.sparse_attention_config = genai.SparseAttentionConfig(
                mode=getattr(genai.SparseAttentionMode, setup["mode"].upper())
            )
        self.pipeline = genai.LLMPipeline(
            setup["model"],
            "CPU",
            scheduler_config=scheduler,
            INFERENCE_NUM_THREADS=setup["threads"],
            PERFORMANCE_HINT="LATENCY",
        )

    def run(self, request):
        prompt = request["ids"][: len(request["ids"]) - request["steps"]]
        ids = self.numpy.array([prompt], dtype=self.numpy.int64)
        tensor = self.openvino.Tensor
        inputs = self.genai.TokenizedInputs(tensor(ids), tensor(self.numpy.ones_like(ids)))
        config = self.genai.GenerationConfig()
        config.max_new_tokens = request["steps"] + 1
        config.ignore_eos = True
        config.do_sample = False
        metrics = self.pipeline.generate(inputs, config).perf_metrics
        if request["steps"] == 0:
            return {"seconds": metrics.get_ttft().mean / 1e3}
        return {"seconds": metrics.get_tpot().mean / 1e3 * request["steps"]}


if __name__ == "__main__":
    peer.serve(Model)
