"""The engine's own load: real steps of the real model."""

from bench.engine.stepping import Stepper, median_seconds, random_adapter, read_bandwidth


def test_a_stepper_decodes_a_batch_with_and_without_adapters() -> None:
    stepper = Stepper("int4")
    adapter = random_adapter(stepper.decoder.layouts, 8, 0)
    stepper.fill(3, 40, [adapter])
    assert stepper.seconds_per_decode(steps=2) > 0
    assert stepper.weight_bytes < 0.36 * 269e6
    assert stepper.kv_bytes(3, 40) == 3 * 40 * 30 * 2 * 3 * 64 * 2


def test_medians_leave_the_warm_up_out() -> None:
    calls = []
    median_seconds(lambda: calls.append(1), 3, warm_up=2)
    assert len(calls) == 5
    assert read_bandwidth() > 0
