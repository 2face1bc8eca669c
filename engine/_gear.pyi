"""Types of the compiled kernel; what they mean is in `_gear.pyx`."""

class Gear:
    def __init__(
        self, table: bytes, hard_bits: int, easy_bits: int, min_bytes: int, avg_bytes: int, max_bytes: int
    ) -> None: ...
    def lengths(self, data: bytes | bytearray | memoryview, start: int) -> list[int]: ...
