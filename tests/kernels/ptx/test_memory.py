"""What kernels may not do to memory: beyond tensors, between copies, without barriers."""

from __future__ import annotations

import pytest
import torch

from m3_kernels.testing.ptx.faults import Fault
from tests.kernels.ptx.handwritten import launch


def numbers(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int32)


def test_an_access_beyond_a_tensor_names_instruction_thread_and_address() -> None:
    tensor = numbers(40)
    out = torch.zeros(64, dtype=torch.int32)
    body = "ld.global.b32 %r10, [%rd10]; st.global.b32 [%rd11], %r10;"
    address = f"{tensor.data_ptr() + 160:#x}"
    with pytest.raises(
        Fault, match=rf"`ld.global.b32 %r10.*thread 8 of program \(1, 0, 0\): address {address}"
    ):
        launch(body, tensor, out, programs=2)
    launch(f"setp.lt.s32 %p1, %r3, 40; @%p1 {body}", tensor, out, programs=2)
    assert torch.equal(out[:40], tensor)


def test_bytes_between_the_numbers_of_a_view_are_no_tensor_s() -> None:
    whole = torch.zeros(32, 2, dtype=torch.int32)
    every_second = "mad.wide.u32 %rd20, %r0, 8, %rd0; st.global.b32 [%rd20], %r0;"
    launch(every_second, whole[:, 0])
    assert torch.equal(whole[:, 0], numbers(32))
    with pytest.raises(Fault, match=r"thread 0 .*in no tensor of the launch"):
        launch(every_second.replace("[%rd20]", "[%rd20+4]"), whole[:, 0])
    with pytest.raises(Fault, match=r"st\.global\.v2.*in no tensor of the launch"):
        launch(
            "mad.wide.u32 %rd20, %r0, 8, %rd0; st.global.v2.b32 [%rd20], {%r0, %r0};", whole[:, 0]
        )


def test_null_and_crooked_addresses() -> None:
    with pytest.raises(Fault, match="address 0x0"):
        launch("mov.b64 %rd20, 0; ld.global.b32 %r9, [%rd20];", numbers(32))
    with pytest.raises(Fault, match="not a multiple of 8"):
        launch("ld.global.v2.b32 {%r9, %r10}, [%rd10];", numbers(64))


def test_two_threads_that_write_other_numbers_to_one_address() -> None:
    with pytest.raises(Fault, match="another thread writes another number"):
        launch("st.global.b32 [%rd0], %r0;", numbers(1))
    launch("mov.b32 %r9, 5; st.global.b32 [%rd0], %r9;", numbers(1))


# Threads write, and read what a thread of the other warp wrote.
EXCHANGE = """
    shl.b32 %r10, %r0, 2;
    st.shared.b32 [%r10], %r0;
    {between}
    xor.b32 %r11, %r10, {distance};
    ld.shared.b32 %r12, [%r11];
    st.global.b32 [%rd10], %r12;
"""


def test_a_race_between_warps_names_both_instructions() -> None:
    out = torch.zeros(64, dtype=torch.int32)
    with pytest.raises(
        Fault,
        match=r"`ld.shared.b32 %r12.* of thread 0 .*shared byte 128, reads it.*"
        r"without a barrier.*was written by warp 1 with `st.shared.b32",
    ):
        launch(EXCHANGE.format(between="", distance=128), out, threads=64, shared=256)
    ordered = EXCHANGE.format(between="bar.sync 0;", distance=128)
    launch(ordered, out, threads=64, shared=256)
    assert torch.equal(out, numbers(64) ^ 32)
    # within a warp
    launch(EXCHANGE.format(between="", distance=64), out, threads=64, shared=256)
    assert torch.equal(out, numbers(64) ^ 16)


def test_a_write_after_another_warp_s_read() -> None:
    again = EXCHANGE.format(between="bar.sync 0;", distance=128) + "{} st.shared.b32 [%r10], %r9;"
    out = torch.zeros(64, dtype=torch.int32)
    with pytest.raises(Fault, match=r"`st.shared.b32 .*writes it.*was read by warp [01] with `ld"):
        launch(again.format(""), out, threads=64, shared=256)
    launch(again.format("bar.sync 0;"), out, threads=64, shared=256)


def test_two_warps_that_write_the_same_byte() -> None:
    both = "and.b32 %r9, %r0, 31; shl.b32 %r10, %r9, 2; {} st.shared.b32 [%r10], {};"
    with pytest.raises(Fault, match="another number to it at once"):
        launch(both.format("", "%r0"), threads=64, shared=256)
    # the same number, as layouts have it that hold it twice
    launch(both.format("", "%r9"), threads=64, shared=256)
    apart = "st.shared.b32 [{}], %r0;"
    with pytest.raises(Fault, match=r"writes it, and without a barrier.*was written by warp"):
        launch(
            "xor.b32 %r8, %r0, 32; shl.b32 %r10, %r0, 2; shl.b32 %r11, %r8, 2;"
            + apart.format("%r10")
            + apart.format("%r11"),
            threads=64,
            shared=256,
        )


def test_bytes_of_one_word_are_no_race() -> None:
    """The watch is as fine as the smallest access."""
    body = """
        shr.u32 %r9, %r0, 5;
        and.b32 %r10, %r0, 31;
        shl.b32 %r10, %r10, 1;
        add.s32 %r10, %r10, %r9;
        cvt.u16.u32 %rs1, %r0;
        st.shared.b8 [%r10], %rs1;
    """
    launch(body, threads=64, shared=64)


def test_beyond_shared_memory() -> None:
    with pytest.raises(Fault, match=r"thread 16 .*shared byte 64, is beyond the 64 bytes"):
        launch("shl.b32 %r10, %r0, 2; st.shared.b32 [%r10], %r0;", shared=64)


COPY = """
    mad.wide.u32 %rd20, %r0, 16, %rd0;
    shl.b32 %r10, %r0, 4;
    mov.b32 %r11, {size};
    cp.async.cg.shared.global [%r10], [%rd20], 0x10, %r11;
    cp.async.commit_group;
    {between}
    ld.shared.v4.b32 {{%r12, %r13, %r14, %r15}}, [%r10];
    mad.wide.u32 %rd21, %r0, 16, %rd1;
    st.global.v4.b32 [%rd21], {{%r12, %r13, %r14, %r15}};
"""


def test_a_copy_in_flight_may_not_be_read() -> None:
    given, out = numbers(128), torch.zeros(128, dtype=torch.int32)
    for too_early in ("", "bar.sync 0;", "cp.async.wait_group 1;"):
        with pytest.raises(
            Fault, match=r"`ld.shared.v4.*while a copy to it is in flight, started by `cp.async"
        ):
            launch(COPY.format(between=too_early, size=16), given, out, shared=512)
    for enough in ("cp.async.wait_group 0;", "cp.async.wait_all;"):
        out.zero_()
        launch(COPY.format(between=enough, size=16), given, out, shared=512)
        assert torch.equal(out, given)


def test_what_a_copy_does_not_read_is_zero() -> None:
    given, out = numbers(128), torch.zeros(128, dtype=torch.int32)
    wait = "cp.async.wait_group 0;"
    launch(COPY.format(between=wait, size=8), given, out, shared=512)
    wanted = given.view(32, 4).clone()
    wanted[:, 2:] = 0
    assert torch.equal(out.view(32, 4), wanted)
    # an address is not looked at where nothing is read from it
    out.fill_(7)
    nowhere = COPY.format(between=wait, size=0).replace("16, %rd0", "16, 0")
    launch(nowhere, given, out, shared=512)
    assert not out.any()


def test_only_the_last_groups_stay_in_flight() -> None:
    body = """
        mad.wide.u32 %rd20, %r0, 16, %rd0;
        shl.b32 %r10, %r0, 4;
        cp.async.cg.shared.global [%r10], [%rd20], 0x10;
        cp.async.commit_group;
        cp.async.cg.shared.global [%r10+512], [%rd20], 0x10;
        cp.async.commit_group;
        cp.async.wait_group 1;
        ld.shared.b32 %r12, [%r10+{offset}];
    """
    launch(body.format(offset=0), numbers(128), shared=1024)
    with pytest.raises(Fault, match="in flight"):
        launch(body.format(offset=512), numbers(128), shared=1024)


def test_what_a_thread_waited_for_others_see_behind_a_barrier() -> None:
    def body(between: str) -> str:
        other = f"cp.async.wait_group 0; {between} xor.b32 %r10, %r10, 512;"
        return COPY.format(between=other, size=16)

    given, out = numbers(256), torch.zeros(256, dtype=torch.int32)
    with pytest.raises(Fault, match=r"was written by warp 1 with `cp\.async"):
        launch(body(""), given, out, threads=64, shared=1024)
    launch(body("bar.sync 0;"), given, out, threads=64, shared=1024)
    assert torch.equal(out.view(2, 128), given.view(2, 128).flip(0))


def test_a_copy_into_what_another_warp_still_reads() -> None:
    """A buffer of a pipeline that is filled again too early."""
    body = """
        mad.wide.u32 %rd20, %r0, 16, %rd0;
        shl.b32 %r10, %r0, 4;
        xor.b32 %r11, %r10, 512;
        ld.shared.b32 %r12, [%r11];
        {}
        cp.async.cg.shared.global [%r10], [%rd20], 0x10;
    """
    with pytest.raises(Fault, match=r"`cp.async.*writes it.*was read by warp [01] with `ld.shared"):
        launch(body.format(""), numbers(256), threads=64, shared=1024)
    launch(body.format("bar.sync 0;"), numbers(256), threads=64, shared=1024)
