"""The shares of a training step: which kernel is for what, and what is added up."""

import re
from pathlib import Path

import pytest
import torch

from bench import timeline
from bench.timeline import Kernel

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
OURS = "void mixed_attention::cuda::hopper::(anonymous namespace)::"
NAMES = {
    "attention forward": [
        OURS + "hopper_attention_fwd_kernel<FwdConfig<__nv_bfloat16, 64>>(FwdKernelParams)",
        "void mixed_attention::cuda::attention_combine_kernel<__half, AllRows>(FwdParams, float const*)",
        "void mixed_attention::cuda::portable::portable_fwd_kernel<(Arithmetic)2, 64>(FwdArguments, InlineWork)",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, cutlass::half_t>>(Flash_fwd_params)",
        "void pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<64, 64, 256, 4>>(Flash_fwd_params)",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6_128x128x64_kernel0_0",
        "fmha_cutlassF_f32_aligned_64x64_rf_sm80(AttentionKernel<float, cutlass::arch::Sm80>::Params)",
        "triton_tem_fused_flex_attention_0",
    ],
    "attention backward": [
        OURS + "hopper_bwd_stats_kernel<float, 64>(BwdStatsKernelParams)",
        OURS + "hopper_dk_dv_kernel<DkDvConfig<__half, 64, false>>(DkDvKernelParams)",
        "void mixed_attention::cuda::portable::portable_sum_kernel<float>(SumArguments)",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<cutlass::half_t>(Flash_bwd_params)",
        "void pytorch_flash::flash_bwd_dot_do_o_kernel<true>(Flash_bwd_params)",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_31_64x64x64_kernel0_0",
        "void cudnn::fusion::compute_dot_do_o_specialized<true, __half>(params)",
        "void cudnn::fusion::convert_dq_to_16bits<true, __half>(params)",
        "fmha_cutlassB_f32_aligned_64x64_k64_sm80(AttentionBackwardKernel<float>::Params)",
        "triton_tem_fused_flex_attention_backward_2",
    ],
    "rotation": [
        "void mixed_attention::cuda::(anonymous namespace)::rope_kernel<__half, 4, true>(RopeParams)",
        "void at::native::elementwise_kernel<128, 2, MulFunctor<c10::complex<float>>>(int)",
        "void at::native::vectorized_elementwise_kernel<2, at::native::conj_kernel_cuda(at::TensorIteratorBase&)>(int)",
    ],
    "matrix products": [
        "nvjet_sm90_hsh_192x128_64x5_1x2_h_bz_coopB_bias_TNT",
        "sm90_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize128x128x32_cublas",
        "void cutlass::Kernel2<cutlass_80_tensorop_f16_s16816gemm_relu_f16>(Params)",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __half>(Params)",
    ],
    "casts, copies, elementwise": [
        "void mixed_attention::cuda::(anonymous namespace)::cast_kernel<__half>(CastParams)",
        "void mixed_attention::cuda::(anonymous namespace)::column_sums_kernel<__half2>(ColumnSumsParams)",
        "void at::native::vectorized_elementwise_kernel<4, GeluCUDAKernelImpl>(int)",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy<float, 3>(float*)",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float>(int)",
        "Memset (Device)",
        "Memcpy DtoD (Device -> Device)",
    ],
    "other": ["_radius_kernel"],
}


@pytest.mark.parametrize(("bucket", "name"), [(bucket, name) for bucket, names in NAMES.items() for name in names])
def test_names(bucket, name):
    assert timeline.bucket_of(name) == bucket


EXPECTED = (timeline.FORWARD, timeline.BACKWARD, "rotation", "casts, copies, elementwise")


def test_every_kernel_of_ours_has_a_bucket():
    sources = (path.read_text() for path in CUDA.rglob("*.cu*"))
    names = {name for source in sources for name in re.findall(r"__global__[^;{]*?(\w+_kernel)\(", source)}
    assert {"hopper_attention_fwd_kernel", "portable_dq_kernel", "rope_kernel", "upload_kernel"} <= names
    for name in names:
        ready = timeline.BEFORE_ATTENTION.search(OURS + name)
        assert ready or timeline.bucket_of(OURS + name) in EXPECTED, name


def test_tables_and_parts_count_towards_the_kernel_that_reads_them():
    names = [OURS + "upload_kernel()", OURS + "hopper_half_limbs_kernel()", OURS + "hopper_attention_fwd_kernel()"]
    names += [OURS + "hopper_mask_kernel()", "nvjet_hsh", OURS + "hopper_dk_dv_kernel()"]
    times = timeline.by_bucket([Kernel(name, 100 * i, 100 * i + 2**i) for i, name in enumerate(names)])
    assert times["attention forward"] == 1 + 2 + 4
    assert times["attention backward"] == 8 + 32
    assert times["matrix products"] == 16


def test_time_that_kernels_share_counts_for_the_first():
    names = ["nvjet_hsh", OURS + "hopper_dk_dv_kernel()", OURS + "rope_kernel()"]
    times = timeline.by_bucket([Kernel(name, *span) for name, span in zip(names, [(0, 10), (8, 14), (9, 12)])])
    assert (times["matrix products"], times["attention backward"], times["rotation"]) == (10, 4, 0)


def test_the_gpu_is_busy_while_any_kernel_runs():
    assert timeline.busy([Kernel("a", 0, 5), Kernel("b", 2, 4), Kernel("c", 4, 8), Kernel("d", 10, 11)]) == 9


def test_rows(monkeypatch):
    """Four calls make a sample. Their kernels are made up: on a CPU there are none."""
    profiled = [Kernel("nvjet_hsh", 0.0, 400.0), Kernel(OURS + "hopper_dq_kernel()", 500.0, 700.0)]
    monkeypatch.setattr(timeline, "kernels", lambda run: run() or profiled)
    calls = []
    (row,) = timeline.rows("a case", {"ours": lambda: calls.append(0)}, torch.device("cpu"), "bfloat16", 3)
    assert len(calls) == 4 * (2 + 3 + 1)
    assert row["buckets"]["matrix products"] == pytest.approx(0.1)
    assert row["buckets"]["attention backward"] == pytest.approx(0.05)
    assert row["buckets"]["idle"] == 0  # such calls take less than these kernels
    assert list(row["buckets"]) == [*timeline.NAMES, "idle"]


def test_what_cannot_be_profiled_is_absent(monkeypatch):
    def kernels(run):
        raise RuntimeError("the profiler saw no kernel")

    monkeypatch.setattr(timeline, "kernels", kernels)
    (row,) = timeline.rows("a case", {"ours": lambda: None}, torch.device("cpu"), "bfloat16", 3)
    assert row["kind"] == "absent" and row["reason"] == "RuntimeError: the profiler saw no kernel"
