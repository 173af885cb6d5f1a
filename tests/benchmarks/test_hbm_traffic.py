"""`hbm_traffic`: what a compiled program moves, from text as the compiler of TPUs writes it."""

import pytest

from funnel_benchmarks.hbm_traffic import hbm_traffic

PROGRAM = """HloModule jit_f, is_scheduled=true

%fused_slice (param_0.1: f32[1000,256], param_1.1: bf16[256]) -> bf16[1000,128] {{
  %param_0.1 = f32[1000,256]{{1,0:T(8,128)}} parameter(0)
  %param_1.1 = bf16[256]{{0:T(256)}} parameter(1)
  %slice.1 = f32[1000,128]{{1,0:T(8,128)}} slice(%param_0.1), slice={{[0:1000], [0:128]}}
  %pair.1 = bf16[1000,128]{{1,0:T(8,128)}} broadcast(%param_1.1), dimensions={{}}
  ROOT %convert.1 = bf16[1000,128]{{1,0:T(8,128)(2,1)}} convert(%slice.1)
}}

%fused_update (param_0.2: bf16[1000,256], param_1.2: bf16[1000,128]) -> bf16[1000,256] {{
  %param_0.2 = bf16[1000,256]{{1,0:T(8,128)(2,1)}} parameter(0)
  %param_1.2 = bf16[1000,128]{{1,0:T(8,128)(2,1)}} parameter(1)
  %zero = s32[]{{:T(128)}} constant(0)
  ROOT %dus = bf16[1000,256]{{1,0:T(8,128)(2,1)}} dynamic-update-slice(%param_0.2, %param_1.2, %zero, %zero)
}}

ENTRY %main.1 (x.1: f32[1000,256], w.1: bf16[256]) -> bf16[1000,256] {{
  %x.1 = f32[1000,256]{{1,0:T(8,128)}} parameter(0)
  %w.1 = bf16[256]{{0:T(256)}} parameter(1)
  %y.1 = bf16[1000,256]{{1,0:T(8,128)(2,1)}} parameter(2)
{body}
}}
"""


@pytest.mark.parametrize(
    ("body", "moved"),
    [
        # read 256,000 x 4 and write it
        ("  ROOT %c = f32[1000,256]{0,1:T(8,128)} copy(%x.1)", 2 * 1_024_000),
        ("  ROOT %c = f32[1000,256]{0,1:T(8,128)S(1)} copy(%x.1)", 1_024_000),  # into vector memory
        # a fusion that takes half of an array, and all of a small one
        (
            "  ROOT %f = bf16[1000,128]{1,0:T(8,128)(2,1)} fusion(%x.1, %w.1), kind=kLoop, calls=%fused_slice",
            512_000 + 512 + 256_000,
        ),
        # an update in place: reads and writes the part, not the whole
        (
            "  %h = bf16[1000,128]{1,0:T(8,128)(2,1)} fusion(%x.1, %w.1), kind=kLoop, calls=%fused_slice\n"
            "  ROOT %u = bf16[1000,256]{1,0:T(8,128)(2,1)} fusion(%y.1, %h), kind=kLoop, calls=%fused_update",
            512_000 + 512 + 256_000 + 2 * 256_000,
        ),
        # the same with the part in vector memory
        (
            "  %h = bf16[1000,128]{1,0:T(8,128)(2,1)S(1)} fusion(%x.1, %w.1), kind=kLoop, calls=%fused_slice\n"
            "  ROOT %u = bf16[1000,256]{1,0:T(8,128)(2,1)} fusion(%y.1, %h), kind=kLoop, calls=%fused_update",
            512_000 + 512 + 256_000,
        ),
        ("  ROOT %s = f32[10,256]{1,0:T(8,128)} slice(%x.1), slice={[0:10], [0:256]}", 2 * 10_240),
        # an asynchronous copy into vector memory, which is then free to read
        (
            "  %start = (f32[1000,256]{1,0:T(8,128)S(1)}, f32[1000,256]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x.1)\n"
            "  %done = f32[1000,256]{1,0:T(8,128)S(1)} copy-done(%start)\n"
            '  ROOT %t = f32[1000,256]{1,0:T(8,128)} custom-call(%done), custom_call_target="tpu_custom_call"',
            2 * 1_024_000,
        ),
        # a view costs nothing
        (
            "  %b = f32[1000,2,128]{2,1,0:T(8,128)} bitcast(%x.1)\n"
            "  ROOT %t = (f32[1000,2,128]{2,1,0:T(8,128)}, f32[1000,256]{1,0:T(8,128)}) tuple(%b, %x.1)",
            0,
        ),
    ],
)
def test_bytes_between_memory_and_chip(body, moved):
    assert hbm_traffic(PROGRAM.format(body=body)) == moved
