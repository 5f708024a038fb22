"""The whole policy, slowly: one text at a time, whole matrices, no cache, nothing packed. Read this first.

No other file of the project is used: all that is fast is tested against this one, and this one against the transformers
library. Weights come as a dict: the base's under the checkpoint's names; X.lora_A and X.lora_B, the adapter of X; and
heads.up, up_bias, weight and bias, the U, u, w and b of all exits' heads, stacked. Equations are numbered as in the
README. T tokens of a text, D width, C size of an attention head, L layers, V vocabulary, E exits: depths at which a
token may stop.
"""

import torch

EXIT_HEAD = ("up", "up_bias", "weight", "bias")


class Reference:
    def __init__(self, weights, config, exits=(), lora_scale=0.0):  # alpha / r; at 0 it is the base model
        self.w, self.config, self.exits, self.lora_scale = weights, config, exits, lora_scale
        self.L, self.depth_of_outcome = config.num_hidden_layers, (*exits, config.num_hidden_layers)

    def streams(self, ids, depths):
        """The residual streams (T, D) of a text after 0, 1, .. L layers, when its tokens run `depths` of them. From
        then on a token is frozen: no layer changes it, yet each makes a key and a value of it, for later tokens."""
        h = [self.w["model.embed_tokens.weight"][torch.tensor(ids)]]
        for i in range(self.L):
            running = torch.tensor(depths)[:, None] > i
            h.append(torch.where(running, self.layer(h[i], i), h[i]))
        return h

    def policy(self, ids, depths, temperature=1.0, delta=0.0):
        """What the last token may do if those before it ran `depths` layers: the probability (E,) to stop at each exit,
        once it is there, and that of the next token (E + 1, V), a row for each depth at which the last may stop. delta
        is added to the exits' logits; it is 0 in training."""
        # The last token's stream on its way up: at depth e it is the same whether the token stops there or goes on.
        h = [after[-1] for after in self.streams(ids, [*depths, self.L])]
        z = [self.exit_logit(h[e], i) for i, e in enumerate(self.exits)]
        logits = self.read_out(torch.stack([h[depth] for depth in self.depth_of_outcome]))
        return torch.sigmoid(torch.stack(z) + delta), (logits / temperature).softmax(-1)

    def exit_logit(self, h, i):
        """z of exit i, by its head, from the stream h (D) or (T, D) at its depth, taken at unit root mean square."""
        x, head = self.norm(h), {name: self.w[f"heads.{name}"][i] for name in EXIT_HEAD if f"heads.{name}" in self.w}
        if "up" in head:  # a hidden layer
            x = x @ head["up"].T + head["up_bias"]
            x = x * x.sigmoid()
        return x @ head["weight"] + head["bias"]

    def sample(self, prompt, count, dice):
        """Draws a response of `count` tokens, and their depths. dice(t): 1 + E random numbers of position t, for the
        token that it predicts and for each exit on its way up. No eos here: in use, a response ends at its first eos,
        a token with a depth like the others, or is cut, and then r_task of (1) is 0 but depth and KL are paid for."""
        ids, depths = list(prompt), [self.L] * (len(prompt) - 1)  # a prompt runs at full depth, but for its last token
        for t in range(len(prompt) - 1, len(prompt) - 1 + count):
            p_exit, p_token = self.policy(ids, depths)
            die, *coins = dice(t)
            i = [*(coin < p for coin, p in zip(coins, p_exit, strict=True)), True].index(True)  # the first to say stop
            depths.append(self.depth_of_outcome[i])
            ids.append(int((p_token[i].cumsum(0) <= die).sum()))  # the first at which the sum is above the die
        return ids[len(prompt) :], depths[len(prompt) - 1 :]

    def score(self, prompt, response, depths, forward_kl=False, **options):
        """Eq. (2) of each token of a response, as its two terms, log pi(l_t) and the log of the token's probability at
        that depth; and the KL of (1) and (5), from what the policy says there to what the base model says, with
        forward_kl the other way round. Shape (3, tokens of the response)."""
        scores, base = [], Reference(self.w, self.config, self.exits)
        for t, (token, depth) in enumerate(zip(response, depths, strict=True)):
            ids, before = [*prompt, *response[:t]], [self.L] * (len(prompt) - 1) + list(depths[:t])
            (p_exit, p_token), i = self.policy(ids, before, **options), self.depth_of_outcome.index(depth)
            p, p_base = p_token[i], base.policy(ids, [self.L] * len(before), **options)[1][-1]  # -1: at full depth
            kl = (p_base * (p_base / p).log()).sum() if forward_kl else (p * (p / p_base).log()).sum()
            scores.append(torch.stack([stick_breaking(p_exit)[i].log(), p[token].log(), kl]))
        return torch.stack(scores, 1)

    # From here on it is any Qwen2, Qwen3 or Llama: nothing knows of exits.
    def layer(self, h, i):
        at = f"model.layers.{i}"
        h = h + self.attention(self.norm(h, f"{at}.input_layernorm"), f"{at}.self_attn")
        x = self.norm(h, f"{at}.post_attention_layernorm")
        gate, up = self.linear(x, f"{at}.mlp.gate_proj"), self.linear(x, f"{at}.mlp.up_proj")
        return h + self.linear(gate * gate.sigmoid() * up, f"{at}.mlp.down_proj")

    def attention(self, x, at):
        q, k, v = self.queries_keys_values(x, at)
        k, v = (y.repeat_interleave(len(q) // len(y), 0) for y in (k, v))  # several query heads share a key
        later = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(later, -torch.inf).softmax(-1)
        return self.linear((weights @ v).transpose(0, 1).flatten(1), f"{at}.o_proj")

    def queries_keys_values(self, x, at):
        """(T, D) -> three of (heads, T, C). RoPE turns the pair (i, i + C/2) of a head at t by t theta^(-2i / C)."""
        C, theta = self.config.head_dim, self.config.rope_theta
        q, k, v = (self.linear(x, f"{at}.{n}_proj").unflatten(-1, (-1, C)).transpose(0, 1) for n in "qkv")
        if f"{at}.q_norm.weight" in self.w:  # Qwen3
            q, k = self.norm(q, f"{at}.q_norm"), self.norm(k, f"{at}.k_norm")
        angle = torch.arange(len(x))[:, None] * theta ** (-2 * torch.arange(C // 2, dtype=x.dtype) / C)
        cos, sin = angle.cos(), angle.sin()
        q, k = (torch.cat([a * cos - b * sin, b * cos + a * sin], -1) for a, b in (q.chunk(2, -1), k.chunk(2, -1)))
        return q, k, v

    def linear(self, x, name):
        y, a = x @ self.w[f"{name}.weight"].T + self.w.get(f"{name}.bias", 0), self.w.get(f"{name}.lora_A")
        return y if a is None else y + self.lora_scale * (x @ a.T @ self.w[f"{name}.lora_B"].T)

    def norm(self, x, name=None):
        x = x / (x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt()
        return x * self.w[f"{name}.weight"] if name else x

    def read_out(self, h):
        return self.norm(h, "model.norm") @ self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"]).T


def stick_breaking(p):
    """Eq. (S): to stop at an exit is to pass all before it; what is left runs every layer. (E,) -> (E + 1,)."""
    return torch.cat([p, torch.ones(1)]) * torch.cat([torch.ones(1), (1 - p).cumprod(0)])
