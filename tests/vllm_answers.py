"""What vLLM makes of checkpoints: `python vllm_answers.py REQUEST.json ANSWER.json`, in the Python of `make vllm`.

The request: {"tokens": [id, ...], "new_tokens": n, "models": {name: {"folder": path, "dtype": "float32"}}}. The answer,
by name: {"logprobs": of each token but the first, given those before it, "generated": [id, ...]}, or {"error": text}.
"""

import gc
import json
import os
import sys
from pathlib import Path

# One process, so that the engine ends with it; a cache of 1 GiB.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR"
)
os.environ.update(VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")


def answers(folder, dtype, tokens, new_tokens):
    """Greedy tokens after `tokens`, and the log probabilities of these."""
    import vllm

    engine = vllm.LLM(
        folder, dtype=dtype, enforce_eager=True, max_model_len=32, seed=0, disable_log_stats=True
    )
    greedy = vllm.SamplingParams(
        temperature=0, max_tokens=new_tokens, prompt_logprobs=0, ignore_eos=True
    )
    [output] = engine.generate([{"prompt_token_ids": tokens}], greedy, use_tqdm=False)
    found = output.prompt_logprobs[1:]  # the first token has none
    engine.llm_engine.engine_core.shutdown()
    return {
        "logprobs": [known[token].logprob for known, token in zip(found, tokens[1:], strict=True)],
        "generated": list(output.outputs[0].token_ids),
    }


def main(request, answer):
    from vllm.distributed import cleanup_dist_env_and_memory

    asked = json.loads(Path(request).read_text())
    found = {}
    for name, model in asked["models"].items():
        try:
            found[name] = answers(
                model["folder"], model["dtype"], asked["tokens"], asked["new_tokens"]
            )
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
        gc.collect()
        cleanup_dist_env_and_memory()
    Path(answer).write_text(json.dumps(found))


if __name__ == "__main__":  # vLLM starts processes that import this file
    main(*sys.argv[1:])
