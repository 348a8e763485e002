from typing import final

@final
class Place:
    def __new__(cls, path: bytes, dir_fd: int) -> Place: ...

def working_directory() -> int: ...
