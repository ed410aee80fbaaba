"""Counting of kernels, memory traffic and loops in the text of XLA's optimised programs."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import hlo

# An array of 1000 float32 numbers is 4000 bytes.
PROGRAM = """\
HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p0: f32[1000], p1: f32[1000]) -> f32[1000] {
  %p0 = f32[1000]{0} parameter(0)
  %p1 = f32[1000]{0} parameter(1)
  ROOT %m = f32[1000]{0} multiply(%p0, %p1)
}

%one_row (p0: f32[8,1000], p1: s32[]) -> f32[1000] {
  %p0 = f32[8,1000]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,1000]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,1000}
  ROOT %b = f32[1000]{0} bitcast(%row)
}

%update (p0: f32[8,1000], p1: f32[1,1000], p2: s32[]) -> f32[8,1000] {
  %p0 = f32[8,1000]{1,0} parameter(0)
  %p1 = f32[1,1000]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %u = f32[8,1000]{1,0} dynamic-update-slice(%p0, %p1, %p2, %zero)
}

ENTRY
"""


def program(*lines: str, more: str = "") -> str:
    """The computations above, with these lines as the entry computation."""
    entry = "ENTRY %main (x: f32[1000], y: f32[1000]) -> f32[1000] {\n"
    given = "  %x = f32[1000]{0} parameter(0)\n  %y = f32[1000]{0} parameter(1)\n"
    given += "  %rows = f32[8,1000]{1,0} parameter(2)\n  %i = s32[] parameter(3)\n"
    body = given + "".join(f"  {line}\n" for line in lines) + "}\n"
    return PROGRAM.replace("ENTRY\n", more + entry + body)


def count(*lines: str, more: str = "") -> hlo.Counts:
    return hlo.count(program(*lines, more=more))


def test_a_fusion_reads_each_operand_once_and_writes_its_results():
    line = "ROOT %f = f32[1000]{0} fusion(%x, %y), kind=kLoop, calls=%fused"
    assert count(line) == hlo.Counts(traffic=12000, kernels=1)
    line = "ROOT %f = f32[1000]{0} fusion(%x, %x), kind=kLoop, calls=%fused"
    assert count(line) == hlo.Counts(traffic=8000, kernels=1)


def test_names_of_memory_count_nothing():
    found = count(
        "%f = (f32[1000]{0}, f32[1000]{0}) fusion(%x, %y), kind=kLoop, calls=%fused",
        "%g = f32[1000]{0} get-tuple-element(%f), index=1",
        "%b = f32[10,100]{1,0} bitcast(%g)",
        "ROOT %t = (f32[10,100]{1,0}, f32[1000]{0}) tuple(%b, %x)",
    )
    assert found == hlo.Counts(traffic=16000, kernels=1)


def test_vmem_and_library_workspaces_are_not_hbm():
    found = count(
        "%c = (f32[1000]{0:T(1024)S(1)}, f32[1000]{0}, u32[]{:S(2)}) copy-start(%x)",
        "%d = f32[1000]{0:T(1024)S(1)} copy-done(%c)",
        "ROOT %f = f32[1000]{0} fusion(%d, %y), kind=kLoop, calls=%fused",
    )
    assert found == hlo.Counts(traffic=4000 + 8000, kernels=2)
    call = 'custom_call_target="__cublas$lt$matmul"'
    found = count(f"%c = (f32[1000]{{0}}, s8[33554432]{{0}}) custom-call(%x, %y), {call}")
    assert found == hlo.Counts(traffic=12000, kernels=1)


def test_slices_count_as_what_they_touch():
    row = "ROOT %f = f32[1000]{0} fusion(%rows, %i), kind=kLoop, calls=%one_row"
    assert count(row) == hlo.Counts(traffic=4000 + 4 + 4000, kernels=1)
    one = "%one = f32[1,1000]{1,0} bitcast(%x)"
    update = "%f = f32[8,1000]{1,0} fusion(%rows, %one, %i), kind=kLoop, calls=%update"
    assert count(one, update) == hlo.Counts(traffic=4000 + 4 + 4000, kernels=1)
    part = "((f32[8,1000]{1,0}), f32[2,1000]{1,0:S(1)}, s32[]{:S(2)})"
    assert count(f"%s = {part} slice-start(%rows), slice={{[0:2], [0:1000]}}") == hlo.Counts(
        traffic=8000, kernels=1
    )


BODY = """\
%body (s: (s32[], f32[1000])) -> (s32[], f32[1000]) {
  %s = (s32[], f32[1000]{0}) parameter(0)
  %n = s32[] get-tuple-element(%s), index=0
  %v = f32[1000]{0} get-tuple-element(%s), index=1
  %f = f32[1000]{0} fusion(%v, %v), kind=kLoop, calls=%fused
  ROOT %t = (s32[], f32[1000]{0}) tuple(%n, %f)
}

%condition (s: (s32[], f32[1000])) -> pred[] {
  %s = (s32[], f32[1000]{0}) parameter(0)
  %n = s32[] get-tuple-element(%s), index=0
  %limit = s32[] constant(7)
  ROOT %less = pred[] compare(%n, %limit), direction=LT
}

"""
LOOP = "(s32[], f32[1000]{0}) while(%start), condition=%condition, body=%body"


def test_loops_count_by_their_trips():
    stated = LOOP + ', backend_config={"known_trip_count":{"n":"5"}}'
    lines = ["%start = (s32[], f32[1000]{0}) tuple(%i, %x)", f"%w = {stated}"]
    assert count(*lines, more=BODY) == hlo.Counts(traffic=5 * 8000, kernels=5, loops=1)
    lines[1] = f"%w = {LOOP}"
    once = hlo.Counts(traffic=8000, kernels=1, loops=1, unknown_trips=1)
    assert count(*lines, more=BODY) == once, "the counter's start is an argument"
    two = ["%two = s32[] constant(2)", "%c = s32[] copy(%two)"]
    lines[0] = "%start = (s32[], f32[1000]{0}) tuple(%c, %x)"
    found = count(*two, *lines, more=BODY)
    assert (found.loops, found.unknown_trips, found.kernels) == (1, 0, 1 + 5)
    assert found.traffic == 5 * 8000 + 8  # the copy of the counter


def test_collectives_with_the_larger_of_operands_and_results():
    found = count(
        "%a = f32[4000]{0} all-gather(%x), dimensions={0}",
        "%r = f32[1000]{0} all-reduce-start(%x), to_apply=%add",
        "%d = f32[1000]{0} all-reduce-done(%r)",
    )
    assert (found.collectives, found.collective_bytes, found.kernels) == (2, 16000 + 4000, 2)


def test_dtypes_of_less_than_a_byte_and_dynamic_shapes():
    sizes = [b.bytes for b in hlo.buffers("(s4[10]{0}, pred[3]{0}, bf16[<=5,2]{1,0}, f8e4m3fn[6])")]
    assert sizes == [5, 3, 20, 6]


def test_a_tpu_pads_to_whole_tiles():
    sizes = [
        b.bytes
        for b in hlo.buffers("(f32[3,49,49]{2,1,0:T(8,128)}, bf16[5,9]{0,1:T(8,128)(2,1)S(1)})")
    ]
    assert sizes == [4 * 3 * 56 * 128, 2 * 128 * 16]
    assert [b.bytes for b in hlo.buffers("f32[300]{0:T(1024)}")] == [4096]


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.count("HloModule jit_f")


def test_a_program_that_xla_compiled_here():
    def f(rows, x):
        def turn(x, row):
            return jnp.tanh(x * row), None

        return jax.lax.scan(turn, x, rows)[0]

    rows, x = jnp.ones((6, 1000)), jnp.ones(1000)
    found = hlo.count(jax.jit(f).lower(rows, x).compile().as_text())
    assert (found.loops, found.unknown_trips) == (1, 0)
    # Six times: read a row and the carried array, write the carried array.
    assert 6 * 12000 <= found.traffic < 7 * 12000
    assert 6 <= found.kernels <= 6 * 4
