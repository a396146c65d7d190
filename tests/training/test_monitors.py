"""What receives the values of a run."""

from training import monitors


def test_a_full_disk_ends_the_events_and_not_the_training(tmp_path, monkeypatch):
    warnings, calls = [], []
    monkeypatch.setattr(monitors.logger, "warning", warnings.append)

    def no_space(*_):
        calls.append(1)
        raise IndexError("events.out.tfevents: No space left on device")  # as TensorFlow says it

    for name in ("process_summary", "process_event", "_write_graph", "_trigger", "_after_train"):
        monkeypatch.setattr(monitors.TFEventWriter, name, no_space)
    writer = monitors.EventWriter(str(tmp_path))
    writer.process_summary(None)
    writer.process_event(None)
    writer._write_graph()
    writer._trigger()
    writer._after_train()
    assert len(calls) == len(warnings) == 1
    assert "No space left on device" in warnings[0]
