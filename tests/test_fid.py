"""FID, KID and Inception score of images, through our Inception and our arithmetic, against torch-fidelity's."""

import numpy as np
import pytest
from flax import nnx
from parity import assert_parity, nchw
from PIL import Image
from published import published
from safetensors.numpy import save_file
from test_features import inception_weights, recording

from ddistill.evaluate import frechet, inception_score, kid
from ddistill.evaluate.scores import scores, wanted
from ddistill.evaluate.seen import Wanted, look
from ddistill.hub.features import load_features
from ddistill.hub.weights import tensors_of
from ddistill.net import split
from ddistill.networks.inception import InceptionConfig, InceptionV3
from ddistill.networks.preprocess import clean, tensorflow

SIDE, COUNT = 75, 16
SURE = 100
"""What logits are multiplied by: with random weights all classes are nearly alike."""


def images():
    """Coarse noise, and finer, darker noise, [16, 32, 32, 3] each."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (COUNT, 8, 8, 3))
    fine = rng.integers(0, 180, (COUNT, 16, 16, 3))
    return tuple(np.kron(x, np.ones((1, n, n, 1))).astype(np.uint8) for x, n in ((coarse, 4), (fine, 2)))


def larger():
    """The same with sides of 96, which Clean-FID makes smaller."""
    return tuple(np.kron(x, np.ones((1, 3, 3, 1), np.uint8)) for x in images())


def shrunk(x):
    """Images [n, H, W, 3] as Clean-FID brings them to SIDE x SIDE, floats in 0 … 255."""
    colours = [Image.fromarray(c.astype(np.float32)) for c in np.moveaxis(x, 3, 1).reshape(-1, *x.shape[1:3])]
    resized = np.asarray([np.asarray(c.resize((SIDE, SIDE), Image.BICUBIC)) for c in colours])
    return np.clip(np.moveaxis(resized.reshape(len(x), 3, SIDE, SIDE), 1, 3), 0, 255)


def spanned(real, fake):
    """Features [16, 2048] in the 32 dimensions that they span: the distance has no part in any other."""
    basis = np.linalg.qr(np.concatenate([real, fake]).T.astype(np.float64))[0]
    return real @ basis, fake @ basis


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """The numbers as the project computes them, from a file of weights."""
    params = split(nnx.eval_shape(lambda: InceptionV3(InceptionConfig(), rngs=nnx.Rngs(0))))[0]
    file = tmp_path_factory.mktemp("fid") / "inception.safetensors"
    save_file(inception_weights({t.name: t.shape for p, a in params.items() for t in tensors_of(p, a.shape)}), file)
    rows = Wanted(rows=frozenset({"inception.pool", "inception.logits"}))

    def seen(preprocessing, needs, pictures):
        networks = {"inception": load_features(InceptionConfig(), file, preprocessing)}
        return [look(networks, [(np.arange(COUNT), x)], needs, batch_size=COUNT)[0] for x in pictures]

    real, fake = (part.rows for part in seen(tensorflow(SIDE), rows, images()))
    # As `ddistill evaluate` does by default: of all 2048 dimensions, from summed moments, resized as by Clean-FID.
    one, other = seen(clean(SIDE), wanted(("fid",)), larger())
    pools = real["inception.pool"], fake["inception.pool"]
    return {
        "fid": frechet(*spanned(*pools)),
        "fid_clean": scores(("fid",), other, one)["fid"],
        "kid": kid(*pools, subsets=1, size=COUNT).mean,
        "is": inception_score(SURE * fake["inception.logits"], splits=1)[0],
    }


def test_fid_kid_and_is_equal_the_recorded_numbers_of_torch_fidelity(ours):
    assert_parity("fid", ours, tolerance=1e-3)
    assert ours["fid"] > 0.1 and ours["is"] > 1.1


@pytest.mark.torch
def test_fid_kid_and_is_equal_torch_fidelitys(ours, request, tmp_path, monkeypatch):
    published("torch_fidelity")
    import torch
    from torch_fidelity import feature_extractor_inceptionv3
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    class Small(FeatureExtractorInceptionV3):
        INPUT_IMAGE_SIZE = SIDE

        def load_state_dict(self, state):  # before the file is asked for: it has none
            shapes = {n: tuple(p.shape) for n, p in self.state_dict().items()}
            weights = {n: torch.from_numpy(w) for n, w in inception_weights(shapes).items()}
            torch.nn.Module.load_state_dict(self, weights, strict=False)

    torch.save({}, tmp_path / "none.pth")
    model = Small("inception-v3-compat", ["2048", "logits_unbiased"], str(tmp_path / "none.pth"))
    with torch.no_grad():
        (real, _), (fake, logits) = (model(torch.from_numpy(np.ascontiguousarray(nchw(x)))) for x in images())
        # Clean-FID's images are floats; torch-fidelity asks for bytes, and leaves what has its size as it is.
        monkeypatch.setattr(feature_extractor_inceptionv3, "vassert", lambda *_: None)
        pools = [model(torch.from_numpy(np.ascontiguousarray(nchw(shrunk(x)))))[0] for x in larger()]

    def fid(*features):
        statistics = [fid_features_to_statistics(torch.from_numpy(x)) for x in spanned(*(f.numpy() for f in features))]
        return fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]

    theirs = {
        "fid": fid(real, fake),
        "fid_clean": fid(*pools),
        "kid": kid_features_to_metric(real, fake, kid_subsets=1, kid_subset_size=COUNT, verbose=False)[
            "kernel_inception_distance_mean"
        ],
        "is": isc_features_to_metric(SURE * logits, splits=1)["inception_score_mean"],
    }
    assert_parity("fid", ours, theirs, recording=recording(request), tolerance=1e-3)
    assert ours == pytest.approx(theirs, rel=1e-3)
