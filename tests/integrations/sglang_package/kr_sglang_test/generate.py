"""A model's tokens in SGLang's engine and their log-probabilities, as a line of JSON. Arguments: the model's folder."""

import json
import sys

NEW_TOKENS = 12
PROMPTS = [[3, 17, 91, 40, 5], [8, 8, 120], [77, 2, 45, 66, 30, 12, 9]]

if __name__ == "__main__":  # the engine's processes import this module again
    import sglang

    engine = sglang.Engine(
        model_path=sys.argv[1], device="cpu", dtype="float32", attention_backend="torch_native",
        disable_cuda_graph=True, disable_overlap_schedule=True, disable_radix_cache=True, max_total_tokens=2048,
        max_running_requests=4, skip_tokenizer_init=True, skip_server_warmup=True, log_level="info")
    answers = engine.generate(input_ids=PROMPTS, sampling_params={
        "temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}, return_logprob=True)
    print(json.dumps([[token[:2] for token in answer["meta_info"]["output_token_logprobs"]] for answer in answers]),
          flush=True)
    engine.shutdown()
