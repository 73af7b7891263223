"""The decoder and the value model once more, in float64 numpy: the oracle of `models/` and of `decoding/`.

One unpadded sequence at a time, from its first token, without batch, mask, segments or cache. It takes the package's
parameters (stacked) and reads its configs, and calls none of its code. Shapes: T tokens, D embed, E head_dim, V
vocabulary, M outputs of a value head.
"""

import jax
import jax.numpy as jnp
import numpy as np


def to_float64(params):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


def random_params(seed, init, config):
    """Float32 parameters of the shapes that `init(key, config)` gives, with noise on every leaf: no bias, norm scale or
    head is at a value that hides it. (The package's own initializers take ten seconds to compile.)
    """
    rng = np.random.default_rng(seed)

    centers = {"scale": 1.0, "token_shift": 0.5}
    scales = {"scale": 0.3, "token_shift": 0.3, "bias": 0.3, "embedding": 0.7, "positions": 0.7}

    def draw(path, leaf):
        name = path[-1].key
        scale = scales.get(name) or leaf.shape[-2] ** -0.5  # a matrix keeps the variance of what goes through it
        return jnp.asarray(centers.get(name, 0) + scale * rng.normal(size=leaf.shape), jnp.float32)

    return jax.tree.map_with_path(draw, jax.eval_shape(lambda key: init(key, config), jax.random.key(0)))


# --- The decoder ----------------------------------------------------------------------------------------------------


def hidden(params, config, tokens):
    """[T] ids -> [T, D], after the final norm."""
    tokens = np.asarray(tokens)
    x = params["embedding"][tokens]
    if config.token_shift:
        x[1:] += params["token_shift"] * params["embedding"][tokens[:-1]]
    if config.positions == "learned":
        x = x + params["positions"][: len(tokens)]
    for i in range(config.layers):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
        x = x + attention(layer, config, norm(layer["attention_norm"], config, x))
        x = x + feed_forward(layer, config, norm(layer["mlp_norm"], config, x))
    return norm(params["final_norm"], config, x)


def logits(params, config, hidden):
    """[..., D] -> [..., V]."""
    return hidden @ (params["embedding"].T if config.tied else params["head"])


def attention(layer, config, x):
    """Causal, one query head after another."""
    width, sharing = config.head_dim, config.heads // config.kv_heads
    query, key, value = (dense(layer[name], x) for name in ("query", "key", "value"))
    heads = []
    for head in range(config.heads):
        mine = slice(head * width, (head + 1) * width)
        shared = slice(head // sharing * width, (head // sharing + 1) * width)
        q, k, v = query[:, mine], key[:, shared], value[:, shared]
        if config.qk_norm:
            q, k = norm(layer["query_norm"], config, q), norm(layer["key_norm"], config, k)
        if config.positions == "rope":
            q, k = rotate(q, config), rotate(k, config)
        scores = q @ k.T / np.sqrt(width)
        scores[np.triu_indices(len(x), 1)] = -np.inf
        heads.append(softmax(scores) @ v)
    return dense(layer["output"], np.concatenate(heads, axis=-1))


def rotate(x, config):
    """[T, E]: the pair (x[j], x[j + E/2]) turns by t * frequency[j] at position t, as a complex number does."""
    length, width = x.shape
    frequencies = [frequency(config, config.rope_theta ** (-2 * j / width)) for j in range(width // 2)]
    turned = (x[:, : width // 2] + 1j * x[:, width // 2 :]) * np.exp(1j * np.outer(np.arange(length), frequencies))
    return np.concatenate([turned.real, turned.imag], axis=-1)


def frequency(config, plain):
    """Llama 3.1's scaling, as its publishers describe it, of one frequency in radians a position."""
    wavelength = 2 * np.pi / plain
    if wavelength > config.rope_original_positions / config.rope_low_freq:
        return plain / config.rope_factor
    if wavelength < config.rope_original_positions / config.rope_high_freq:
        return plain
    turns = config.rope_original_positions / wavelength
    smooth = (turns - config.rope_low_freq) / (config.rope_high_freq - config.rope_low_freq)
    return (1 - smooth) * plain / config.rope_factor + smooth * plain


def feed_forward(layer, config, x):
    up = dense(layer["up"], x)
    if config.activation == "swiglu":
        gate = dense(layer["gate"], x)
        return dense(layer["down"], gate / (1 + np.exp(-gate)) * up)
    return dense(layer["down"], up / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3))))


def norm(leaf, config, x):
    if config.norm == "rms":
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.norm_eps) * leaf["scale"]
    centered = x - np.mean(x, axis=-1, keepdims=True)
    scaled = centered / np.sqrt(np.mean(centered**2, axis=-1, keepdims=True) + config.norm_eps)
    return scaled * leaf["scale"] + leaf["bias"]


def dense(leaf, x):
    return x @ leaf["kernel"] + leaf.get("bias", 0)


def softmax(x):
    weights = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


# --- The value model ------------------------------------------------------------------------------------------------


def value_outputs(params, config, tokens, candidates):
    """A value head's outputs for each candidate as the token after `tokens`, [K, M]."""
    if config.type == "q":
        last = hidden(params["trunk"], config.trunk, tokens)[-1]
        return dense(params["head"], last).reshape(config.trunk.vocab_size, config.outputs)[candidates]
    ends = [hidden(params["trunk"], config.trunk, [*tokens, candidate])[-1] for candidate in candidates]
    return dense(params["head"], np.stack(ends))


def law(config, outputs):
    """The reward-to-go that outputs [..., M] stand for: its atoms [n] or [..., n] and their probabilities [..., n]."""
    if config.distribution == "categorical":
        return np.asarray(config.atoms), softmax(outputs)
    if config.distribution == "bernoulli":
        p = 1 / (1 + np.exp(-outputs))
        return np.asarray([0.0, 1.0]), np.concatenate([1 - p, p], axis=-1)
    return outputs, np.ones_like(outputs)
