"""The reader of compiled programs, on a program of a dozen lines in which every count is known."""

import pytest

from qsharp_jax.plan import program

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
BACK = (
    "%back = (bf16[16,1,2048,128]{3,2,0,1:T(8,128)(2,1)}, bf16[16,1,2048,128]{3,2,0,1:T(8,128)(2,1)S(1)}, u32[]{:S(2)})"
    " copy-start(%arrived)"
)
TURNED = "%turned = bf16[1,16,2048,128]{3,1,2,0:T(8,128)(2,1)} copy(%cache)"


def read(extra=""):
    return program.Program(TEXT.replace("BACK", extra))


def test_a_step_is_the_loop_within_the_loop():
    assert read().step == "step"
    assert read().loop == {"block", "true", "step", "look_up", "halve", "searching", "add"}


def test_collectives_are_those_of_a_step_and_of_its_inner_loops():
    found = read().collectives()
    assert program.count(found) == {"all-reduce": 2, "all-gather": 1}
    assert [i.source for i in found if "Block" in i.source] == ["Block/down/dot_general"]
    assert [i.name for i in read().repeated_collectives()] == ["agreed"]
    assert sorted(map(program.result_bytes, found)) == [16 * 4, 16 * 4 * 2, 16 * 256 * 2]


@pytest.mark.parametrize("extra, names", [("", []), (BACK, ["back"]), (TURNED, ["turned"])])
def test_copies_in_the_loop_are_found_and_reads_ahead_are_none(extra, names):
    assert [i.name for i in read(extra).copies([(16, 1, 2048, 128)])] == names
    assert not read(extra).copies([(64, 256)])


def test_a_way_back_from_fast_memory_is_told_from_a_copy_within_hbm():
    assert [program.write_back(*read(extra).copies([(16, 1, 2048, 128)])) for extra in (BACK, TURNED)] == [True, False]


def test_bytes_count_what_is_in_hbm_once_a_read_and_once_a_write():
    kernel, gathered = 64 * 256 * 2, 2 * 8 * 4 * 2
    assert read().hbm_bytes() == CACHE + kernel + gathered, "of the table only rows, of the rest all that is in HBM"
    assert read(BACK).hbm_bytes() - read().hbm_bytes() == CACHE
    assert read(TURNED).hbm_bytes() - read().hbm_bytes() == 2 * CACHE


# --- Collectives of a whole program ---------------------------------------------------------------------------------


LAYERS = """HloModule fit, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter.1 (input.0: bf16[64,256]) -> bf16[8,256] {
  %input.0 = bf16[64,256]{1,0:T(8,128)(2,1)} parameter(0)
  %summed = bf16[64,256]{1,0:T(8,128)(2,1)} all-reduce(%input.0), channel_id=3, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %own = bf16[8,256]{1,0:T(8,128)(2,1)} dynamic-slice(%summed)
}

%first_product (part.0: bf16[8,256]) -> bf16[64,256] {
  %part.0 = bf16[8,256]{1,0} parameter(0)
  ROOT %whole.0 = bf16[64,256]{1,0} all-gather(%part.0), channel_id=4, replica_groups=mesh['a'=2,'b'=8,'c'=1] {'b'}, dimensions={0}, frontend_attributes={chain_id="0"}
}

%second_product (part.1: bf16[8,256]) -> bf16[64,256] {
  %part.1 = bf16[8,256]{1,0} parameter(0)
  ROOT %whole.1 = bf16[64,256]{1,0} all-gather(%part.1), channel_id=4, replica_groups=mesh['a'=2,'b'=8,'c'=1] {'b'}, dimensions={0}, frontend_attributes={chain_id="0"}
}

%layer (carry.0: (s32[], bf16[8,256])) -> (s32[], bf16[8,256]) {
  %carry.0 = (s32[], bf16[8,256]{1,0}) parameter(0)
  %weights = bf16[8,256]{1,0} get-tuple-element(%carry.0), index=1
  %first = bf16[64,256]{1,0} fusion(%weights), kind=kOutput, calls=%first_product
  %second = bf16[64,256]{1,0} fusion(%weights), kind=kOutput, calls=%second_product
  %gradient = bf16[8,256]{1,0} fusion(%second), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %next = (s32[], bf16[8,256]{1,0}) tuple(%weights, %gradient)
}

%not_all_layers (carry.1: (s32[], bf16[8,256])) -> pred[] {
  %carry.1 = (s32[], bf16[8,256]{1,0}) parameter(0)
  %layers = s32[] constant(16)
  %number = s32[] get-tuple-element(%carry.1), index=0
  ROOT %less = pred[] compare(%number, %layers), direction=LT
}

ENTRY %main (start.0: (s32[], bf16[8,256])) -> (s32[], bf16[8,256]) {
  %start.0 = (s32[], bf16[8,256]{1,0}) parameter(0)
  %done = (s32[], bf16[8,256]{1,0}) while(%start.0), condition=%not_all_layers, body=%layer
  %loss = f32[2]{0} all-reduce(%partial), channel_id=1, replica_groups=[4,2]<=[8], to_apply=%add
  %exchanged = f32[8,256]{1,0} all-to-all(%loss), channel_id=2, replica_groups={{0,1},{2,3}}, dimensions={0}
  ROOT %result = (s32[], bf16[8,256]{1,0}) tuple(%done)
}
"""


def test_traffic_counts_every_layer_and_what_a_chip_lacks():
    """A gather that is written beside two products is one; a sum of which a chip keeps its part is a scatter."""
    traffic = program.Program(LAYERS).traffic()
    layer = 64 * 256 * 2
    assert traffic == {
        "all-gather": 16 * layer * 7 / 8,
        "reduce-scatter": 16 * layer * 7 / 8,
        "all-reduce": 2 * 4 * 2 * 1 / 2,
        "all-to-all": 8 * 256 * 4 / 2,
    }
