"""A zoo of tiny, randomly initialized `transformers` models, each with its inputs: what capture meets in the wild."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]
Row = tuple[str, str, dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """One family: ``make`` gives its model, in train mode, and the keyword arguments to call the model with."""

    name: str
    kind: str
    make: Callable[[], tuple[nn.Module, Inputs]]


def _make(architecture: str, inputs: Callable[[], Inputs], config: dict[str, Any]) -> tuple[nn.Module, Inputs]:
    import transformers

    model_class = getattr(transformers, architecture)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**copy.deepcopy(config)))
        model.train()
        torch.manual_seed(1)
        return model, inputs()


def _row(name: str, stem: str, **config: Any) -> Row:
    """A family of a group: its class, less the suffix that the group names, and what its configuration adds."""
    return name, stem, config


def _group(kind: str, suffix: str, inputs: Callable[[], Inputs], common: dict[str, Any], *rows: Row) -> list[Family]:
    return [Family(name, kind, partial(_make, stem + suffix, inputs, common | config)) for name, stem, config in rows]


# Inputs, in batches of two.

VOCABULARY, IMAGE_TOKEN = 96, 3


def _ids(length: int = 8) -> Tensor:
    return torch.randint(4, VOCABULARY - 4, (2, length))  # none of the special tokens


def _text(labels: str = "", padded: bool = False, length: int = 8) -> Inputs:
    """Tokens, the second row's last ones padding if asked, and labels to classify, to predict or to translate to."""
    ids = _ids(length)
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    inputs = {"input_ids": ids * mask, "attention_mask": mask} if padded else {"input_ids": ids}
    match labels:
        case "class":
            inputs["labels"] = torch.tensor([0, 1])
        case "next":
            inputs["labels"] = ids.masked_fill(mask == 0, -100) if padded else ids.clone()
        case "target":
            inputs["labels"] = _ids(6)
    return inputs


def _image(*shape: int, labels: bool = True, name: str = "pixel_values") -> Inputs:
    inputs = {name: torch.randn(2, *shape or (3, 32, 32))}
    return {**inputs, "labels": torch.tensor([0, 1])} if labels else inputs


def _sound(*shape: int, labels: str = "", name: str = "input_values") -> Inputs:
    """Samples or features, and labels as text has them: losses of alignment are left out."""
    text = _text(labels)
    del text["input_ids"]
    return {name: torch.randn(2, *shape or (400,)), **text}


def _pair(labels: str = "", **more: Any) -> Inputs:
    return {**_text(labels, padded=True), **_image(labels=False), **more}


def _interleaved() -> Inputs:
    """A text that starts with the places of an image's four patches."""
    ids = torch.cat([torch.full((2, 4), IMAGE_TOKEN), _ids(6)], dim=1)
    labels = ids.masked_fill(ids == IMAGE_TOKEN, -100)
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16), "labels": labels}


def _gridded() -> Inputs:
    inputs = _interleaved()
    kinds = (inputs["input_ids"] == IMAGE_TOKEN).long()
    patches = {"pixel_values": torch.randn(32, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
    return {**inputs, **patches, "mm_token_type_ids": kinds}


def _series() -> Inputs:
    """As much of the past as the context and the longest lag take, and the time, the only feature."""
    past = {"past_values": torch.rand(2, 15), "past_time_features": torch.rand(2, 15, 1)}
    future = {"future_values": torch.rand(2, 4), "future_time_features": torch.rand(2, 4, 1)}
    return {**past, "past_observed_mask": torch.ones(2, 15), **future}


def _channels() -> Inputs:
    return {"past_values": torch.rand(2, 16, 3), "future_values": torch.rand(2, 4, 3)}


# Configurations.

# The defaults suit hundreds of features: in a few, signals die out, and tokens that start at zero get huge gradients.
_TAME = {"initializer_range": 0.1, "init_std": 0.1, "layer_norm_eps": 1e-5}
_SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
_TOWER = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, **_TAME}
_TEXT = {**_SPECIAL, **_TOWER, "max_position_embeddings": 40}
_BERT = {"model_type": "bert", **_TEXT}
_DECODER = {"is_decoder": True, "add_cross_attention": True}
_START = {"decoder_start_token_id": 1, "pad_token_id": 0}
_GROUPED = {**_TEXT, "num_key_value_heads": 2}
_EXPERTS = {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_ROUTED = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
_LATENT = {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4}
_LAYERS = {"encoder_layers": 3, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
_LAYERS |= {"decoder_layers": 3, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
_SEQ2SEQ = {**_SPECIAL, **_LAYERS, **_TAME, "d_model": 32, "max_position_embeddings": 40}
_SEQ2SEQ |= {"decoder_start_token_id": 2}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4, "vocab_size": VOCABULARY}
_T5 |= {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
_FORECAST = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2, 7], "num_time_features": 1}
_FORECAST |= {"d_model": 16, "encoder_layers": 3, "decoder_layers": 3}
_PATCHES = {"prediction_length": 4, "context_length": 16, "patch_length": 4, "patch_stride": 4, "num_input_channels": 3}
_SSM = {"mamba_d_state": 4, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_chunk_size": 4}
_HYBRID = {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "num_experts": 4}
_HYBRID |= {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
_SHARED = {"layers_block_type": ["hybrid", "linear_attention", "hybrid"], "mamba_d_state": 4}
_VIT = {**_TOWER, "image_size": 32, "patch_size": 8}
_SMALL_VIT = {**_VIT, "image_size": 16}
_STAGES = {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 2, 1]}
_ALL = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
_PYRAMID = {**_STAGES, "num_attention_heads": [1, 2, 2, 4]}
_RESNET = {**_STAGES, "embedding_size": 8}
_DETR = {**_LAYERS, "d_model": 32, "num_queries": 4, "backbone_config": {"model_type": "resnet", **_RESNET, **_ALL}}
_WINDOWS = {"patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
_SOUND = {**_TOWER, "vocab_size": 32, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}
_SOUND |= {"conv_dim": [16, 16, 16], "conv_stride": [5, 4, 2], "conv_kernel": [10, 3, 2], "classifier_proj_size": 16}
_SOUND |= {"apply_spec_augment": False}  # NumPy, which torch.manual_seed does not seed, would draw its masks
_TOWERS = {"text_config": {**_TEXT, "projection_dim": 16}, "vision_config": _VIT, "projection_dim": 16}


# fmt: off
def _families() -> list[Family]:
    classify, classify_padded = partial(_text, "class"), partial(_text, "class", padded=True)
    translate, translate_padded = partial(_text, "target"), partial(_text, "target", padded=True)
    predict, features = partial(_text, "next"), partial(_sound, 20, 16, name="input_features")
    return [
        *_group("encoder", "ForSequenceClassification", classify, _TEXT,
            _row("bert", "Bert"), _row("fnet", "FNet"), _row("ibert", "IBert"), _row("xlm", "XLM"),
            _row("yoso", "Yoso"), _row("albert", "Albert", embedding_size=16),
            _row("canine", "Canine", downsampling_rate=2, num_hash_buckets=32, local_transformer_stride=4),
            _row("convbert", "ConvBert", embedding_size=32, conv_kernel_size=3),
            _row("deberta", "Deberta", relative_attention=True, pos_att_type=["c2p", "p2c"]),
            _row("electra", "Electra", embedding_size=16),
            _row("nystromformer", "Nystromformer", num_landmarks=4, segment_means_seq_len=8),
            _row("perceiver", "Perceiver", num_latents=4, d_latents=16, d_model=16, num_self_attends_per_block=2,
                 num_self_attention_heads=2, num_cross_attention_heads=2)),
        *_group("encoder", "ForSequenceClassification", classify_padded, _TEXT,
            _row("mpnet", "MPNet"), _row("nomic_bert", "NomicBert"), _row("roberta", "Roberta"), _row("tapas", "Tapas"),
            _row("xlm_roberta", "XLMRoberta"), _row("xmod", "Xmod", languages=["en_XX"], default_language="en_XX"),
            _row("deberta_v2", "DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True,
                 position_buckets=8, norm_rel_ebd="layer_norm"),
            _row("distilbert", "DistilBert", hidden_dim=48),
            _row("esm", "Esm", position_embedding_type="rotary", mask_token_id=3),
            _row("layoutlmv3", "LayoutLMv3", visual_embed=False, coordinate_size=5, shape_size=6),
            _row("lilt", "Lilt", hidden_size=48),
            _row("longformer", "Longformer", attention_window=4),
            _row("mobilebert", "MobileBert", embedding_size=16, intra_bottleneck_size=16, true_hidden_size=16),
            _row("modernbert", "ModernBert", cls_token_id=1, local_attention=4),
            _row("rembert", "RemBert", input_embedding_size=16, output_embedding_size=16),
            _row("roformer", "RoFormer", embedding_size=32),
            _row("squeezebert", "SqueezeBert", embedding_size=32)),
        *_group("encoder", "ForSequenceClassification", classify_padded, _SPECIAL,
            _row("funnel", "Funnel", block_sizes=[1, 1, 1], d_model=32, n_head=4, d_head=8, d_inner=48),
            _row("xlnet", "XLNet", d_model=32, n_layer=3, n_head=4, d_inner=48)),
        *_group("encoder", "ForSequenceClassification", partial(_text, "class", length=16), _TEXT,
            _row("big_bird", "BigBird", block_size=2, num_random_blocks=1)),
        *_group("encoder", "ForPrediction", _channels, _PATCHES,
            _row("patchtst", "PatchTST", d_model=16, num_hidden_layers=3, num_attention_heads=4, ffn_dim=32),
            _row("patchtsmixer", "PatchTSMixer", d_model=16, num_layers=3)),
        *_group("decoder", "ForCausalLM", predict, _GROUPED,
            _row("biogpt", "BioGpt"), _row("bloom", "Bloom"), _row("cohere", "Cohere"), _row("diffllama", "DiffLlama"),
            _row("falcon", "Falcon"), _row("gpt_bigcode", "GPTBigCode"), _row("gpt_neox", "GPTNeoX"),
            _row("granite", "Granite"), _row("llama", "Llama"), _row("nemotron", "Nemotron"), _row("olmo", "Olmo"),
            _row("olmo2", "Olmo2"), _row("persimmon", "Persimmon"), _row("phi", "Phi"), _row("phi3", "Phi3"),
            _row("qwen2", "Qwen2"), _row("stablelm", "StableLm"), _row("starcoder2", "Starcoder2"),
            _row("gemma", "Gemma", head_dim=8), _row("glm4", "Glm4", head_dim=8), _row("qwen3", "Qwen3", head_dim=8),
            _row("gemma2", "Gemma2", head_dim=8, sliding_window=4),
            _row("gemma3_text", "Gemma3", head_dim=8, sliding_window=4),
            _row("gpt_neo", "GPTNeo", attention_types=[[["global", "local", "global"], 1]], window_size=4),
            _row("gptj", "GPTJ", rotary_dim=4),
            _row("mistral", "Mistral", sliding_window=4),
            _row("mpt", "Mpt", max_seq_len=40),
            _row("opt", "OPT", ffn_dim=48, word_embed_proj_dim=16),
            _row("smollm3", "SmolLM3", no_rope_layer_interval=2),
            _row("xglm", "XGLM", ffn_dim=48)),
        *_group("decoder", "LMHeadModel", partial(_text, "next", padded=True), _TEXT,
            _row("ctrl", "CTRL", dff=48), _row("gpt2", "GPT2"), _row("openai_gpt", "OpenAIGPT")),
        *_group("encoder-decoder", "ForConditionalGeneration", translate, _SEQ2SEQ,
            _row("bart", "Bart"), _row("blenderbot", "Blenderbot"),
            _row("led", "LED", attention_window=4, max_encoder_position_embeddings=40,
                 max_decoder_position_embeddings=40)),
        *_group("encoder-decoder", "ForConditionalGeneration", translate_padded, _SEQ2SEQ,
            _row("m2m_100", "M2M100"), _row("mbart", "MBart"), _row("pegasus", "Pegasus"),
            _row("pegasus_x", "PegasusX", block_size=4, num_global_tokens=4)),
        *_group("encoder-decoder", "ForConditionalGeneration", translate_padded, _T5,
            _row("mt5", "MT5"), _row("t5", "T5"), _row("umt5", "UMT5"),
            _row("longt5", "LongT5", local_radius=4, global_block_size=4, encoder_attention_type="transient-global")),
        *_group("encoder-decoder", "", translate_padded, {},
            _row("marian", "MarianMTModel", **_SEQ2SEQ),
            _row("prophetnet", "ProphetNetForConditionalGeneration", **_SPECIAL, hidden_size=32,
                 num_encoder_layers=3, num_encoder_attention_heads=4, encoder_ffn_dim=48,
                 num_decoder_layers=3, num_decoder_attention_heads=4, decoder_ffn_dim=48, max_position_embeddings=40)),
        # Given labels, it warns that what becomes of them has changed.
        *_group("encoder-decoder", "Model", lambda: {**_text(padded=True), "decoder_input_ids": _ids(6)}, _START,
            _row("encoder_decoder", "EncoderDecoder", encoder=_BERT, decoder={**_BERT, **_DECODER})),
        *_group("encoder-decoder", "ForPrediction", _series, _FORECAST,
            _row("autoformer", "Autoformer", label_length=4, moving_average=3),
            _row("informer", "Informer"), _row("time_series_transformer", "TimeSeriesTransformer")),
        *_group("mixture of experts", "ForCausalLM", predict, _EXPERTS,
            _row("flex_olmo", "FlexOlmo"), _row("granitemoe", "GraniteMoe"), _row("olmoe", "Olmoe"),
            _row("phimoe", "Phimoe"), _row("glm4_moe", "Glm4Moe", **_ROUTED),
            _row("deepseek_v2", "DeepseekV2", **_LATENT, **_ROUTED, q_lora_rank=16),
            _row("deepseek_v3", "DeepseekV3", **_LATENT, **_ROUTED, q_lora_rank=16),
            _row("ernie4_5_moe", "Ernie4_5_Moe", moe_num_experts=4, moe_layer_end_index=2),
            _row("gpt_oss", "GptOss", head_dim=8, sliding_window=4, max_position_embeddings=131072),
            _row("hunyuan_v1_moe", "HunYuanMoEV1", head_dim=8),
            _row("jetmoe", "JetMoe", kv_channels=8),
            _row("lfm2_moe", "Lfm2Moe", layer_types=["conv", "full_attention", "conv"], num_dense_layers=1,
                 num_experts=4),
            _row("llama4_text", "Llama4", head_dim=8, intermediate_size_mlp=48),
            _row("minimax", "MiniMax", head_dim=8, block_size=4),
            _row("mixtral", "Mixtral", output_router_logits=True),
            _row("qwen2_moe", "Qwen2Moe", num_experts=4, shared_expert_intermediate_size=24),
            _row("qwen3_moe", "Qwen3Moe", head_dim=8)),
        *_group("mixture of experts", "ForConditionalGeneration", translate, {"num_experts": 4, "expert_capacity": 8},
            _row("nllb_moe", "NllbMoe", **_SEQ2SEQ, encoder_sparse_step=2, decoder_sparse_step=2),
            _row("switch_transformers", "SwitchTransformers", **_T5, num_decoder_layers=3,
                 num_sparse_encoder_layers=1, num_sparse_decoder_layers=1)),
        *_group("state space", "ForCausalLM", predict, _GROUPED,
            _row("bamba", "Bamba", **_SSM, attn_layer_indices=[1]),
            _row("falcon_h1", "FalconH1", **_SSM, mamba_d_ssm=64),
            _row("falcon_mamba", "FalconMamba", state_size=4, time_step_rank=4),
            _row("granitemoehybrid", "GraniteMoeHybrid", **_SSM, layer_types=["mamba", "attention", "mamba"],
                 num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=24),
            _row("jamba", "Jamba", attn_layer_period=3, attn_layer_offset=1, num_experts=4, mamba_d_state=4,
                 mamba_dt_rank=4),
            _row("kimi_linear", "KimiLinear", **_HYBRID, **_LATENT, linear_head_dim=8, linear_num_heads=4),
            _row("lfm2", "Lfm2", layer_types=["conv", "full_attention", "conv"], block_multiple_of=8),
            _row("mamba", "Mamba", state_size=4, time_step_rank=4),
            _row("mamba2", "Mamba2", state_size=4, num_heads=8, head_dim=8, n_groups=2, chunk_size=4),
            _row("nemotron_h", "NemotronH", layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
                 head_dim=8, ssm_state_size=4, mamba_num_heads=8, mamba_head_dim=8, n_groups=2, chunk_size=4,
                 n_routed_experts=4, moe_intermediate_size=24, moe_shared_expert_intermediate_size=24),
            _row("qwen3_next", "Qwen3Next", **_HYBRID, head_dim=8, linear_key_head_dim=8, linear_value_head_dim=8,
                 linear_num_key_heads=2, linear_num_value_heads=4, shared_expert_intermediate_size=24),
            _row("recurrent_gemma", "RecurrentGemma", head_dim=8, lru_width=32, attention_window_size=4),
            _row("rwkv", "Rwkv", attention_hidden_size=32),
            _row("xlstm", "xLSTM", hidden_size=64, num_heads=4, qk_dim_factor=1.0),
            _row("zamba", "Zamba", **_SHARED, mamba_dt_rank=4),
            _row("zamba2", "Zamba2", **_SHARED, n_mamba_heads=8, chunk_size=4)),
        *_group("vision", "ForImageClassification", _image, _VIT,
            _row("beit", "Beit", use_relative_position_bias=True, layer_scale_init_value=0.1),
            _row("clip_vision", "CLIP", vision_config=_VIT), _row("siglip_vision", "Siglip", **_TOWERS),
            _row("dinov2", "Dinov2"), _row("dinov2_with_registers", "Dinov2WithRegisters"),
            _row("deit", "DeiT"), _row("vit", "ViT")),
        *_group("vision", "ForImageClassification", partial(_image, 3, 64, 64), {**_TAME, "image_size": 64},
            _row("convnext", "ConvNext", **_STAGES), _row("convnextv2", "ConvNextV2", **_STAGES),
            _row("poolformer", "PoolFormer", **_STAGES), _row("pvt", "Pvt", **_PYRAMID, num_labels=2),
            _row("pvt_v2", "PvtV2", **_PYRAMID), _row("segformer", "Segformer", **_PYRAMID),
            _row("bit", "Bit", **_RESNET, num_groups=4), _row("regnet", "RegNet", **_RESNET, groups_width=4),
            _row("resnet", "ResNet", **_RESNET), _row("swin", "Swin", **_WINDOWS), _row("swinv2", "Swinv2", **_WINDOWS),
            _row("cvt", "Cvt", embed_dim=[8, 16, 32], num_heads=[1, 2, 4], depth=[1, 2, 3]),
            _row("efficientnet", "EfficientNet", width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320,
                 initializer_range=0.3),
            _row("focalnet", "FocalNet", patch_size=2, embed_dim=8, hidden_sizes=[8, 16], depths=[2, 1]),
            _row("hgnet_v2", "HGNetV2", stem_channels=[3, 8, 8], stage_in_channels=[8, 8, 16, 16],
                 stage_mid_channels=[8, 8, 8, 8], stage_out_channels=[8, 16, 16, 32], hidden_sizes=[8, 16, 16, 32],
                 stage_num_blocks=[1, 1, 2, 1], stage_numb_of_layers=[2, 2, 2, 2]),
            _row("hiera", "Hiera", image_size=[64, 64], embed_dim=8, depths=[1, 1, 1], num_heads=[1, 2, 4],
                 num_query_pool=2),
            _row("levit", "Levit", hidden_sizes=[16, 16, 32], num_attention_heads=[2, 2, 4], depths=[1, 1, 1],
                 key_dim=[4, 4, 4], down_ops=[["Subsample", 4, 4, 4, 2, 2], ["Subsample", 4, 4, 4, 2, 2]]),
            _row("mobilenet_v1", "MobileNetV1", depth_multiplier=0.125, classifier_dropout_prob=0.1),
            _row("mobilenet_v2", "MobileNetV2", depth_multiplier=0.125, classifier_dropout_prob=0.1),
            _row("mobilevit", "MobileViT", hidden_sizes=[16, 16, 32], neck_hidden_sizes=[4, 8, 8, 16, 16, 16, 32]),
            _row("mobilevitv2", "MobileViTV2", width_multiplier=0.125),
            _row("swiftformer", "SwiftFormer", embed_dims=[8, 16, 16, 32], depths=[1, 1, 1, 1]),
            _row("textnet", "TextNet", stem_out_channels=8, hidden_sizes=[8, 8, 8, 16, 16])),
        *_group("vision", "ForVideoClassification", partial(_image, 4, 3, 16, 16), {**_SMALL_VIT, "num_frames": 4},
            _row("timesformer", "Timesformer"), _row("videomae", "VideoMAE")),
        *_group("vision", "", partial(_image, 3, 64, 64, labels=False), {**_TAME, "image_size": 64},
            _row("deformable_detr", "DeformableDetrForObjectDetection", **_DETR),
            _row("detr", "DetrForObjectDetection", **_DETR),
            _row("glpn", "GLPNForDepthEstimation", **_PYRAMID, decoder_hidden_size=8),
            _row("upernet", "UperNetForSemanticSegmentation", hidden_size=16, auxiliary_channels=8, pool_scales=[1, 2],
                 auxiliary_in_channels=16, backbone_config={"model_type": "convnext", **_STAGES, **_ALL})),
        *_group("vision", "", partial(_image, labels=False), _VIT,
            _row("dinov3_vit", "DINOv3ViTModel"),
            _row("dpt", "DPTForDepthEstimation", num_hidden_layers=4, backbone_out_indices=[0, 1, 2, 3],
                 neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8),
            _row("vit_mae", "ViTMAEForPreTraining", decoder_num_attention_heads=2, decoder_hidden_size=16,
                 decoder_num_hidden_layers=2, decoder_intermediate_size=24),
            _row("yolos", "YolosForObjectDetection", image_size=[32, 32], num_detection_tokens=4)),
        *_group("audio", "ForCTC", _sound, _SOUND,
            _row("sew", "SEW"), _row("unispeech", "UniSpeech"), _row("wav2vec2", "Wav2Vec2"),
            _row("data2vec_audio", "Data2VecAudio", conv_pos_kernel_size=5, num_conv_pos_embeddings=2),
            _row("wav2vec2_conformer", "Wav2Vec2Conformer", conv_depthwise_kernel_size=3)),
        *_group("audio", "ForCTC", features, {"vocab_size": 32, "pad_token_id": 0},
            _row("parakeet", "Parakeet", encoder_config={**_TOWER, "num_mel_bins": 16, "subsampling_conv_channels": 8}),
            _row("wav2vec2_bert", "Wav2Vec2Bert", **_SOUND, feature_projection_input_dim=16)),
        *_group("audio", "ForSequenceClassification", partial(_sound, labels="class"), _SOUND,
            _row("hubert", "Hubert", do_stable_layer_norm=True, feat_extract_norm="layer"),
            _row("sew_d", "SEWD", position_buckets=4), _row("unispeech_sat", "UniSpeechSat"),
            _row("wavlm", "WavLM", num_buckets=8, max_bucket_distance=16)),
        *_group("audio", "ForAudioClassification", partial(_image, 24, 16, name="input_values"), _TOWER,
            _row("audio_spectrogram_transformer", "AST", patch_size=8, frequency_stride=8, time_stride=8,
                 max_length=24, num_mel_bins=16)),
        *_group("audio", "ForConditionalGeneration", partial(features, labels="target"), _SEQ2SEQ,
            _row("speech_to_text", "Speech2Text", input_feat_per_channel=16, max_source_positions=20, conv_channels=16),
            _row("whisper", "Whisper", num_mel_bins=20, max_source_positions=8)),
        *_group("audio", "ForConditionalGeneration", partial(_sound, 2000, labels="target"), _SPECIAL,
            _row("moonshine", "Moonshine", hidden_size=32, intermediate_size=48,
                 encoder_num_hidden_layers=3, encoder_num_attention_heads=4, encoder_num_key_value_heads=4,
                 decoder_num_hidden_layers=3, decoder_num_attention_heads=4, decoder_num_key_value_heads=4)),
        *_group("audio", "", partial(_sound, labels="target"), {},
            _row("speech_encoder_decoder", "SpeechEncoderDecoderModel", **_START,
                 encoder={"model_type": "wav2vec2", **_SOUND}, decoder={**_BERT, **_DECODER}),
            _row("speecht5", "SpeechT5ForSpeechToText", **_SOUND | _SPECIAL | _LAYERS)),
        *_group("audio", "Model", partial(_sound, 1, 320), {},
            _row("encodec", "Encodec", hidden_size=16, num_filters=4, codebook_size=16, codebook_dim=16,
                 upsampling_ratios=[4, 2], num_lstm_layers=1)),
        *_group("multimodal", "Model", partial(_pair, return_loss=True), _TOWERS,
            _row("altclip", "AltCLIP"), _row("chinese_clip", "ChineseCLIP"),
            _row("clip", "CLIP"), _row("siglip", "Siglip"),
            _row("groupvit", "GroupViT", projection_intermediate_dim=32, vision_config={**_VIT, "depths": [1, 1, 1],
                 "num_group_tokens": [8, 4, 0], "num_output_groups": [8, 4, 4]}),
            _row("vision_text_dual_encoder", "VisionTextDualEncoder", text_config=_BERT,
                 vision_config={"model_type": "vit", **_VIT})),
        *_group("multimodal", "", _pair, {},
            _row("flava", "FlavaModel", text_config=_TEXT, image_config=_VIT, multimodal_config=_TOWER, hidden_size=32),
            _row("owlvit", "OwlViTForObjectDetection", **_TOWERS | {"projection_dim": 32})),
        *_group("multimodal", "", partial(_pair, "next"), {},
            _row("blip", "BlipForConditionalGeneration", **_TOWERS),
            _row("git", "GitForCausalLM", **_TEXT, vision_config=_VIT)),
        *_group("multimodal", "ForQuestionAnswering", lambda: _pair() | {"labels": torch.eye(2)}, _TEXT,
            _row("vilt", "Vilt", **_VIT)),
        *_group("multimodal", "Model", lambda: {**_image(labels=False), "labels": _ids(6)}, _START,
            _row("vision_encoder_decoder", "VisionEncoderDecoder", encoder={"model_type": "vit", **_VIT},
                 decoder={"model_type": "gpt2", **_TEXT, **_DECODER})),
        *_group("multimodal", "", lambda: {**classify(), "visual_embeds": torch.randn(2, 4, 16)}, _TEXT,
            _row("visual_bert", "VisualBertForVisualReasoning", visual_embedding_dim=16)),
        *_group("multimodal", "Model",
            lambda: {**_text(padded=True), **_sound(1, 16, 16, name="input_features"), "return_loss": True}, {},
            _row("clap", "Clap", text_config=_TEXT, projection_dim=16, audio_config={"hidden_size": 16, "spec_size": 16,
                 "num_mel_bins": 16, "window_size": 2, "patch_embeds_hidden_size": 8, "depths": [1, 1],
                 "num_attention_heads": [2, 4]})),
        *_group("multimodal", "ForConditionalGeneration", _interleaved, {"image_token_id": IMAGE_TOKEN},
            _row("aya_vision", "AyaVision", text_config={"model_type": "cohere2", **_GROUPED},
                 vision_config={"model_type": "siglip_vision_model", **_SMALL_VIT, "patch_size": 4}),
            _row("blip2", "Blip2", text_config={**_GROUPED, "ffn_dim": 48, "word_embed_proj_dim": 32},
                 vision_config=_SMALL_VIT, qformer_config={**_TEXT, "encoder_hidden_size": 32}, num_query_tokens=4),
            _row("internvl", "InternVL", text_config={"model_type": "qwen2", **_GROUPED},
                 vision_config={**_SMALL_VIT, "image_size": [16, 16], "patch_size": [4, 4]}),
            _row("llava", "Llava", text_config={"model_type": "llama", **_GROUPED},
                 vision_config={"model_type": "clip_vision_model", **_SMALL_VIT}),
            _row("paligemma", "PaliGemma", text_config={"model_type": "gemma", **_GROUPED, "head_dim": 8},
                 vision_config={"model_type": "siglip_vision_model", **_SMALL_VIT}, projection_dim=32)),
        *_group("multimodal", "ForConditionalGeneration", _gridded, {"image_token_id": IMAGE_TOKEN},
            _row("qwen2_vl", "Qwen2VL", vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4,
                 "patch_size": 4}, text_config={**_GROUPED, "rope_parameters": {"rope_type": "default",
                 "rope_theta": 1e4, "mrope_section": [2, 1, 1]}})),
    ]
# fmt: on


KINDS = ("encoder", "decoder", "encoder-decoder", "mixture of experts", "state space", "vision", "audio", "multimodal")
FAMILIES: tuple[Family, ...] = tuple(sorted(_families(), key=lambda family: (KINDS.index(family.kind), family.name)))
