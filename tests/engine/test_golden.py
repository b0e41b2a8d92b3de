"""The published ESM-2 8M, where its weights are at hand: embeddings that others computed with it."""

from __future__ import annotations

import numpy as np
import pytest
from protnest.engine import Embedder, InputError, load_model, read_fasta

from support.shared_data import shared_path


def test_published_8m_reproduces_others_embeddings() -> None:
    golden = shared_path("golden/tem1_esm2_t6_8M_meanpool_256.npz")
    try:
        model = load_model("esm2_t6_8M_UR50D", device="cpu", precision="fp32")
    except InputError as error:
        pytest.skip(f"the published weights are not at hand: {error}")
    wild_types = {record.id: record.sequence for record in read_fasta(shared_path("dms/wt.fasta"))}
    (wild_type,) = (sequence for name, sequence in wild_types.items() if "BLAT" in name)
    table = np.load(golden)
    mutants = []
    for mutant in table["mutant"][:64].tolist():
        place = int(mutant[1:-1]) - 1
        assert wild_type[place] == mutant[0]
        mutants.append(wild_type[:place] + mutant[-1] + wild_type[place + 1 :])
    np.testing.assert_allclose(Embedder(model).embed(mutants), table["emb"][:64], rtol=0, atol=1e-4)
