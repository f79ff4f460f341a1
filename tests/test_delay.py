import pytest
import torch
from tiny import tiny_generator

from musicrl_hf.delay import codebook_delays, delay_codes, delay_mask, num_steps, undelay_codes


def test_mono_pattern_row_by_row():
    codes = torch.tensor([[[1, 2, 3], [4, 5, 6], [7, 8, 9]]])
    assert delay_codes(codes, 0).tolist() == [[[1, 2, 3, 0, 0], [0, 4, 5, 6, 0], [0, 0, 7, 8, 9]]]
    assert num_steps(3, 3) == 5
    assert delay_mask(3, 3).int().tolist() == [[1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]


def test_stereo_pairs_share_a_delay():
    codes = torch.tensor([[[1, 2], [3, 4], [5, 6], [7, 8]]])
    assert codebook_delays(4, 2) == [0, 0, 1, 1]
    assert delay_codes(codes, 0, 2).tolist() == [[[1, 2, 0], [3, 4, 0], [0, 5, 6], [0, 7, 8]]]
    assert num_steps(2, 4, 2) == 3


@pytest.mark.parametrize(("K", "channels"), [(4, 1), (8, 2), (1, 1)])
def test_undelay_reverses_delay(K, channels):
    codes = torch.randint(0, 16, (3, K, 7))
    assert torch.equal(undelay_codes(delay_codes(codes, 16, channels), channels), codes)


@pytest.mark.parametrize(("K", "channels"), [(4, 1), (8, 2)])
def test_pattern_is_the_stock_one(K, channels):
    model = tiny_generator(audio_channels=channels, K=K)
    F = 9
    steps = num_steps(F, K, channels)
    start = torch.full((K, 1), 16)
    _, pattern = model.decoder.build_delay_pattern_mask(start, pad_token_id=16, max_length=steps + 1)
    assert torch.equal(pattern[:, 1:] == -1, delay_mask(F, K, channels))


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="`audio_channels` = 2 with 3 codebooks"):
        codebook_delays(3, 2)
    with pytest.raises(ValueError, match="`delayed` has 3 steps; 4 codebooks need at least 4"):
        undelay_codes(torch.zeros(1, 4, 3))
