import torch
from safetensors.torch import save_file

from gradientspace.tensor_files import read_aligned


def test_every_tensor_is_read_into_aligned_memory_wherever_it_begins_in_the_file(tmp_path):
    saved = {name: torch.randn(3) for name in "abcdefgh"}
    save_file(saved, tmp_path / "odd.safetensors")

    read = read_aligned(tmp_path / "odd.safetensors")

    assert all(torch.equal(read[name], value) for name, value in saved.items())
    assert {value.data_ptr() % 64 for value in read.values()} == {0}
