"""The engine against plain autograd on every kind of model it claims to know, random tiny configs."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from test_gradients import adapt, make_samples, padded, reference, relative_error
from torch import nn

from gradientspace.errors import ModelError
from gradientspace.gradients import PerSampleGradients

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

VOCAB = 97
COMMON = {"vocab_size": VOCAB, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
GATED = COMMON | {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2}

# Attention implementation: sdpa everywhere.
MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GATED)),
    "llama-tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GATED, tie_word_embeddings=True)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GATED)),
    "mistral-window": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GATED, sliding_window=9)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(
            **GATED,
            sliding_window=9,
            layer_types=["sliding_attention", "full_attention"],
            query_pre_attn_scalar=8,
            final_logit_softcapping=5.0,
        )
    ),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**COMMON, intermediate_size=48, initializer_range=0.2)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)
    ),
    "gpt-neox": lambda: hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(**COMMON, intermediate_size=48, max_position_embeddings=64, initializer_range=0.2)
    ),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(**COMMON, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=16, init_std=0.2)
    ),
    "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**GATED, logit_scale=0.5)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**GATED, num_local_experts=4, num_experts_per_tok=2)),
}


def tiny(name, **lora):
    torch.manual_seed(0)
    model = MODELS[name]()
    if name == "mixtral":  # its experts are fused parameters
        lora = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]} | lora
    return adapt(model, fan_in_fan_out=name == "gpt2", **lora)


def checkpoint(model, reentrant):
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})


def assert_exact(model, samples, limit=1e-5, **options):
    """Against batch size one, in mixed-length batches of two orders."""
    references = torch.stack([reference(model, sample)[1] for sample in samples])
    with PerSampleGradients(model, **options) as engine:
        forward_order = engine.compute(padded(samples))
        backward_order = engine.compute(padded(samples[::-1], side="left")).flip(0)
    assert relative_error(forward_order, references) <= limit
    assert relative_error(backward_order, references) <= limit
    return engine


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_is_exact(name):
    samples = make_samples(32, seed=5)
    engine = assert_exact(tiny(name), samples, packing=False)
    assert engine.path == "fast"
    assert engine._head.mode == "chunked"


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_general_path_is_exact(name):
    engine = assert_exact(tiny(name), make_samples(8), path="general")
    assert engine.path == "general"


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    ("name", "path"), [(name, "fast") for name in MODELS] + [(name, "general") for name in ("llama", "opt", "gpt2")]
)
def test_checkpointed_is_exact_in_both_modes(name, path, reentrant):
    model = tiny(name)
    checkpoint(model, reentrant)
    engine = assert_exact(model, make_samples(8), path=path, packing=False)
    assert "checkpointed layers: 2" in engine.explain()


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral-window", "gpt-neox"])
@pytest.mark.parametrize("path", ["fast", "general"])
def test_packed_is_exact(name, path):
    assert_exact(tiny(name), make_samples(32), packing=True, path=path)


@pytest.mark.parametrize("reentrant", [True, False])
def test_packed_and_checkpointed_is_exact(reentrant):
    model = tiny("llama")
    checkpoint(model, reentrant)
    assert_exact(model, make_samples(8), packing=True)


@pytest.mark.parametrize("name", ["gemma3", "phi", "gpt2", "opt", "mixtral"])
def test_packing_is_refused_elsewhere_with_the_reason(name):
    assert "packing: never; packing is shown to be exact for" in PerSampleGradients(tiny(name)).explain()
    with pytest.raises(ModelError, match="packing"):
        PerSampleGradients(tiny(name), packing=True)


def test_rank_and_alpha_patterns():
    model = tiny("llama", rank_pattern={"q_proj": 2, "down_proj": 7}, alpha_pattern={"v_proj": 3}, use_rslora=True)
    engine = assert_exact(model, make_samples(8))
    assert {block.shape[0] for block in engine.layout if "lora_A" in block.name} == {2, 4, 7}


def test_adapted_lm_head_sees_supervised_tokens_only():
    model = tiny("llama", target_modules=["q_proj", "lm_head"])
    engine = assert_exact(model, make_samples(8))
    assert engine._head.mode == "supervised"
    assert_exact(model, make_samples(8), path="general")
    assert_exact(model, make_samples(8), packing=True)


def test_lora_bias_is_a_block_of_its_own():
    model = tiny("phi", lora_bias=True)
    for path in ("fast", "general"):
        engine = assert_exact(model, make_samples(8), path=path)
        assert any(block.name.endswith("lora_B.default.bias") for block in engine.layout)


def test_logits_that_the_model_changes_in_an_unknown_way():
    class Odd(hf.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits - 0.1 * output.logits**2
            return output

    torch.manual_seed(0)
    model = adapt(Odd(hf.LlamaConfig(**GATED)))
    engine = assert_exact(model, make_samples(8))
    assert engine._head.mode == "model"


def test_the_same_layer_used_twice_adds_up():
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**GATED))
    model.model.layers[1] = model.model.layers[0]
    model.config._attn_implementation = "eager"
    assert_exact(adapt(model), make_samples(8))


def test_more_than_one_adapter():
    model = tiny("llama", target_modules=["q_proj", "v_proj"])
    model.add_adapter("second", LoraConfig(r=3, target_modules=["v_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.second" in name:
                parameter.normal_(std=0.1)
    samples = make_samples(8)
    for adapter in ("default", "second"):
        model.set_adapter(adapter)
        expected = torch.stack([reference(model, sample, adapter)[1] for sample in samples])
        model.set_adapter("default")
        for path in ("fast", "general"):
            with PerSampleGradients(model, adapter, path=path) as engine:
                assert relative_error(engine.compute(padded(samples)), expected) <= 1e-5
        assert model.active_adapters == ["default"]


class UnfusedExperts(nn.Module):
    """Mixtral's experts as a list of modules, each of which sees the tokens routed to it."""

    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, 4, bias=False)
        self.experts = nn.ModuleList(hf.models.llama.modeling_llama.LlamaMLP(config) for _ in range(4))

    def forward(self, hidden):
        tokens = hidden.reshape(-1, hidden.shape[-1])
        weights, chosen = self.gate(tokens).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            which, slot = (chosen == number).nonzero(as_tuple=True)
            out = out.index_add(0, which, expert(tokens[which]) * weights[which, slot, None])
        return out.view_as(hidden)


def routing_gap(model, sample):
    """Smallest distance between the second and the third router probability over a sample's tokens."""
    gaps = []
    handles = [
        m.gate.register_forward_hook(
            lambda _, __, out: gaps.append(out.softmax(-1).topk(3, dim=-1).values.diff(dim=-1)[:, 1].abs().min())
        )
        for m in model.modules()
        if isinstance(m, UnfusedExperts)
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([sample.input_ids]))
    for handle in handles:
        handle.remove()
    return min(gaps).item()


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("path", ["fast", "general"])
def test_unfused_experts_are_exact(path, reentrant):
    torch.manual_seed(0)
    config = hf.LlamaConfig(**GATED)
    model = hf.LlamaForCausalLM(config)
    for layer in model.model.layers:
        layer.mlp = UnfusedExperts(config)
    model = adapt(model, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])
    if reentrant is not None:
        checkpoint(model, reentrant)
    samples = make_samples(32)
    # a tie in the routing is decided by rounding, and then batch size one is another model
    clear = [sample for sample in samples if routing_gap(model, sample) > 1e-5]
    assert len(samples) - len(clear) <= 2
    engine = assert_exact(model, clear, path=path)
    assert "one sample at a time inside base_model.model.model.layers.0.mlp" in engine.explain()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("lora", "named"),
    [
        ({"use_dora": True}, "q_proj.*DoraLinearVariant"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens.*Embedding"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.*ModulesToSaveWrapper"),
        ({"trainable_token_indices": [1, 2]}, "embed_tokens.*TrainableTokensWrapper"),
    ],
)
def test_what_is_not_exact_is_refused_by_name(lora, named):
    with pytest.raises(ModelError, match=named):
        PerSampleGradients(tiny("llama", **lora))


def test_fused_expert_parameters_are_refused_by_name():
    model = tiny("mixtral", target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    with pytest.raises(ModelError, match=r"mlp\.experts.*ParamWrapper"):
        PerSampleGradients(model)


def test_a_merged_adapter_is_refused():
    model = tiny("llama")
    model.merge_adapter()
    with pytest.raises(ModelError, match="unmerge"):
        PerSampleGradients(model)


def test_a_forward_replaced_by_someone_else_takes_the_general_path_in_that_layer():
    model = tiny("llama")
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    original = layer.forward
    layer.forward = lambda *args, **kwargs: original(*args, **kwargs)
    engine = assert_exact(model, make_samples(8))
    assert engine.path == "mixed"
    assert "q_proj: its forward was replaced" in engine.explain()
    with pytest.raises(ModelError, match="q_proj: no fast path"):
        PerSampleGradients(model, path="fast")


def test_a_batch_is_packed_by_itself_where_padding_would_cost_more(monkeypatch):
    model, samples = tiny("llama"), make_samples(8)
    expected = torch.stack([reference(model, sample)[1] for sample in samples])
    rows_seen = []
    for layer in model.modules():
        if isinstance(layer, hf.models.llama.modeling_llama.LlamaMLP):
            layer.register_forward_hook(lambda _, args, __: rows_seen.append(args[0].shape[0]))
    with PerSampleGradients(model) as engine:
        rows_seen.clear()
        assert relative_error(engine.compute(padded(samples)), expected) <= 1e-5
        assert set(rows_seen) == {1}
        rows_seen.clear()
        engine.compute(padded(samples[:1] * 3))
        assert set(rows_seen) == {3}
    model.get_base_model().config._attn_implementation = "eager"
    assert "never; it would replace the attention that was chosen, eager" in PerSampleGradients(model).explain()


class OwnForward(LoraLinear):
    """A LoRA layer with a forward of its own, as PEFT writes them over quantised bases."""

    def forward(self, x, *args, **kwargs):
        result = self.base_layer(x, *args, **kwargs).clone()
        for adapter in self.active_adapters:
            dropout, scaling = self.lora_dropout[adapter], self.scaling[adapter]
            result += self.lora_B[adapter](self.lora_A[adapter](dropout(x))) * scaling
        return result


def test_a_layer_class_that_is_not_known_takes_the_general_path():
    model = tiny("llama")
    for module in model.modules():
        if type(module) is LoraLinear:
            module.__class__ = OwnForward
    engine = assert_exact(model, make_samples(8))
    assert engine.path == "general"
    assert "OwnForward has a forward of its own" in engine.explain()
