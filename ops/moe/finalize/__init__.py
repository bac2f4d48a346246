"""moe.finalize: the slots' rows, weighted and summed, with the shared expert's output, in one launch."""
