"""Every kind of request that is sampled on the device, by what it asks for."""

VOCAB_SIZE = 700
KINDS = {
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 0.7},
    "top-k": {"top_k": 20},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.05},
    "repetition": {"repetition_penalty": 1.4, "temperature": 0.5},
    "presence and frequency": {"presence_penalty": 1.5, "frequency_penalty": -0.7, "temperature": 0.5},
    "biases and bans": {"logit_bias": {3: 4.0, 7: -5.0}, "banned_tokens": [1, 2]},
    "allowed": {"allowed_tokens": [4, 9, 60, 61, 62], "banned_tokens": [60]},
    "ends too early": {"min_tokens": 9, "stop_token_ids": list(range(0, VOCAB_SIZE, 2)), "temperature": 0},
    "all of them": {"top_k": 60, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "presence_penalty": 0.5},
}
