"""The reader of compiled decode loops, on a program of a dozen lines in which every count is known."""

import pytest

from benchmarks import decode_program
from qsharp_jax.plan.program import result_bytes

TEXT = """HloModule decode, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%look_up (table.0: bf16[1000,64], row.0: s32[16]) -> bf16[16,64] {
  %table.0 = bf16[1000,64]{1,0:T(8,128)(2,1)} parameter(0)
  %row.0 = s32[16]{0:T(128)} parameter(1)
  ROOT %gather.0 = bf16[16,64]{1,0:T(8,128)(2,1)} gather(%table.0, %row.0), offset_dims={1}
}

%halve (bounds.0: s32[16]) -> s32[16] {
  %bounds.0 = s32[16]{0:T(128)} parameter(0)
  ROOT %agreed = s32[16]{0:T(128)} all-reduce(%bounds.0), channel_id=9, to_apply=%add, metadata={op_name="jit(decode)/while/body/while/body/closed_call/while/body/reduce_sum"}
}

%searching (bounds.1: s32[16]) -> pred[] {
  %bounds.1 = s32[16]{0:T(128)} parameter(0)
  ROOT %always = pred[]{:T(512)} constant(true)
}

%step (carry.0: (bf16[16,1,2048,128], bf16[1000,64], s32[16], bf16[64,256])) -> (bf16[16,1,2048,128], bf16[1000,64], s32[16], bf16[64,256]) {
  %carry.0 = (bf16[16,1,2048,128]{3,2,1,0:T(8,128)(2,1)}, bf16[1000,64]{1,0}, s32[16]{0}, bf16[64,256]{1,0}) parameter(0)
  %cache = bf16[16,1,2048,128]{3,2,0,1:T(8,128)(2,1)} get-tuple-element(%carry.0), index=0
  %table = bf16[1000,64]{1,0:T(8,128)(2,1)} get-tuple-element(%carry.0), index=1
  %row = s32[16]{0:T(128)S(1)} get-tuple-element(%carry.0), index=2
  %kernel = bf16[64,256]{1,0:T(8,128)(2,1)} get-tuple-element(%carry.0), index=3
  %there = (bf16[16,1,2048,128]{3,2,0,1:T(8,128)(2,1)S(1)}, bf16[16,1,2048,128]{3,2,0,1:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%cache)
  %arrived = bf16[16,1,2048,128]{3,2,0,1:T(8,128)(2,1)S(1)} copy-done(%there)
  %looked_up = bf16[16,64]{1,0:T(8,128)(2,1)S(1)} fusion(%table, %row), kind=kLoop, calls=%look_up
  %product = bf16[16,256]{1,0:T(8,128)(2,1)S(1)} dot(%looked_up, %kernel), metadata={op_name="jit(decode)/while/body/while/body/closed_call/Block/up/dot_general"}
  %summed = bf16[16,256]{1,0:T(8,128)(2,1)S(1)} all-reduce(%product), channel_id=1, to_apply=%add, metadata={op_name="jit(decode)/while/body/while/body/closed_call/Block/down/dot_general"}
  %gathered = (bf16[8,4]{1,0}, bf16[16,4]{1,0}) all-gather-start(%product), channel_id=2, dimensions={0}
  %found = s32[16]{0:T(128)} while(%row), condition=%searching, body=%halve
  BACK
  ROOT %carried = (bf16[16,1,2048,128]{3,2,1,0}, bf16[1000,64]{1,0}, s32[16]{0}, bf16[64,256]{1,0}) tuple(%cache, %table, %found, %kernel)
}

%true (carry.1: (bf16[16,1,2048,128], bf16[1000,64], s32[16], bf16[64,256])) -> pred[] {
  %carry.1 = (bf16[16,1,2048,128]{3,2,1,0}, bf16[1000,64]{1,0}, s32[16]{0}, bf16[64,256]{1,0}) parameter(0)
  ROOT %yes = pred[]{:T(512)} constant(true)
}

%block (carry.2: (bf16[16,1,2048,128], bf16[1000,64], s32[16], bf16[64,256])) -> (bf16[16,1,2048,128], bf16[1000,64], s32[16], bf16[64,256]) {
  %carry.2 = (bf16[16,1,2048,128]{3,2,1,0}, bf16[1000,64]{1,0}, s32[16]{0}, bf16[64,256]{1,0}) parameter(0)
  ROOT %steps = (bf16[16,1,2048,128]{3,2,1,0}, bf16[1000,64]{1,0}, s32[16]{0}, bf16[64,256]{1,0}) while(%carry.2), condition=%true, body=%step
}

ENTRY %main (argument: (bf16[16,1,2048,128], bf16[1000,64], s32[16], bf16[64,256])) -> (bf16[16,1,2048,128], bf16[1000,64], s32[16], bf16[64,256]) {
  %argument = (bf16[16,1,2048,128]{3,2,1,0}, bf16[1000,64]{1,0}, s32[16]{0}, bf16[64,256]{1,0}) parameter(0)
  %outside = bf16[16,1,2048,128]{3,2,1,0} copy(%argument)
  ROOT %blocks = (bf16[16,1,2048,128]{3,2,1,0}, bf16[1000,64]{1,0}, s32[16]{0}, bf16[64,256]{1,0}) while(%argument), condition=%true, body=%block
}
"""
CACHE = 16 * 2048 * 128 * 2  # bytes
SLICED = "%part = bf16[1,16,256,128]{3,2,1,0:T(8,128)(2,1)S(1)} fusion(%cache, %row), kind=kLoop, calls=%window"
WINDOW = """%window (buffer.0: bf16[16,1,2048,128], begin.0: s32[]) -> bf16[16,1,256,128] {
  %buffer.0 = bf16[16,1,2048,128]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %begin.0 = s32[]{:T(128)} parameter(1)
  %turned.0 = bf16[1,16,2048,128]{3,2,1,0:T(8,128)(2,1)} bitcast(%buffer.0)
  ROOT %slice.0 = bf16[1,16,256,128]{3,2,1,0:T(8,128)(2,1)} dynamic-slice(%turned.0, %begin.0), dynamic_slice_sizes={1,16,256,128}
}

%true (carry.1"""
SEEN = "%seen = bf16[1,16,2048,128]{3,2,1,0:T(8,128)(2,1)S(1)} fusion(%cache), kind=kLoop, calls=%turn"
TURN = """%turn (buffer.5: bf16[16,1,2048,128]) -> bf16[1,16,2048,128] {
  %buffer.5 = bf16[16,1,2048,128]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %turned.5 = bf16[1,16,2048,128]{3,2,1,0:T(8,128)(2,1)} bitcast(%buffer.5)
}

"""
BACK = (
    "%back = (bf16[16,1,2048,128]{3,2,0,1:T(8,128)(2,1)}, bf16[16,1,2048,128]{3,2,0,1:T(8,128)(2,1)S(1)}, u32[]{:S(2)})"
    " copy-start(%arrived)"
)
TURNED = "%turned = bf16[1,16,2048,128]{3,1,2,0:T(8,128)(2,1)} copy(%cache)"


def read(extra=""):
    return decode_program.DecodeProgram(TEXT.replace("BACK", extra).replace("%true (carry.1", TURN + WINDOW))


def test_a_step_is_the_loop_within_the_loop():
    assert read().step == "step"
    assert read().loop == {"block", "true", "step", "look_up", "halve", "searching", "add"}


def test_collectives_are_those_of_a_step_and_of_its_inner_loops():
    found = read().collectives()
    assert decode_program.count(found) == {"all-reduce": 2, "all-gather": 1}
    assert [i.source for i in found if "Block" in i.source] == ["Block/down/dot_general"]
    assert [i.name for i in read().repeated_collectives()] == ["agreed"]
    assert sorted(map(result_bytes, found)) == [16 * 4, 16 * 4 * 2, 16 * 256 * 2]


@pytest.mark.parametrize("extra, names", [("", []), (BACK, ["back"]), (TURNED, ["turned"])])
def test_copies_in_the_loop_are_found_and_reads_ahead_are_none(extra, names):
    assert [i.name for i in read(extra).copies([(16, 1, 2048, 128)])] == names
    assert not read(extra).copies([(64, 256)])
    back = [decode_program.is_write_back(copy) for copy in read(extra).copies([(16, 1, 2048, 128)])]
    assert back == [extra == BACK] * len(names), "a way back from fast memory is no copy within HBM"


def test_bytes_count_what_is_in_hbm_once_a_read_and_once_a_write():
    kernel, gathered = 64 * 256 * 2, 2 * 8 * 4 * 2
    rows = 16 * 64 * 2
    assert read().hbm_bytes() == CACHE + kernel + gathered + rows, "of the table rows, of the rest all that is in HBM"
    assert read(BACK).hbm_bytes() - read().hbm_bytes() == CACHE
    assert read(TURNED).hbm_bytes() - read().hbm_bytes() == 2 * CACHE
    assert read(SEEN).hbm_bytes() - read().hbm_bytes() == CACHE
    assert read(SLICED).hbm_bytes() - read().hbm_bytes() == CACHE // 8
