"""The reader of compiled programs, on a program of a dozen lines in which every count is known."""

from qsharp_jax.plan.program import Program

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
    traffic = Program(LAYERS).traffic()
    layer = 64 * 256 * 2
    assert traffic == {
        "all-gather": 16 * layer * 7 / 8,
        "reduce-scatter": 16 * layer * 7 / 8,
        "all-reduce": 2 * 4 * 2 * 1 / 2,
        "all-to-all": 8 * 256 * 4 / 2,
    }
