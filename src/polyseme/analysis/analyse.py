"""Analysis of a model and data into a run."""

from __future__ import annotations

from polyseme.analysis.flow import run_analysis
from polyseme.analysis.kinds import Engine
from polyseme.analysis.source import source_of
from polyseme.errors import InputError, one_of
from polyseme.options import AnalysisOptions, takes
from polyseme.views import Run

_ENGINES = ("local", "ray")


@takes(AnalysisOptions)
def analyse(options: AnalysisOptions) -> Run:
    """Find what activates each neuron, split it into features, and write it all to a run.

    The data is read once, for all sites together, in bounded memory. The model runs in evaluation
    mode and is restored afterwards. In texts, each neuron has at most one example per context: the
    position where it fires most, among the tokens that count (`Contexts`).

    An option that does not apply to the data is refused: those from ``labels`` to ``baseline`` are
    for images and other arrays, ``window`` and ``importances`` for texts.

    Returns
    -------
    Run

    Raises
    ------
    InputError
        For data that the model does not accept, NaN or infinite values, an empty data set, or an
        option out of range.
    SiteError
        For a site that the model does not have.
    RunError
        If the folder is in the way or belongs to another analysis.

    References
    ----------
    A. Foote, *Tackling Polysemanticity with Neuron Embeddings*, arXiv 2411.08166 (2024).
    """
    if options.engine not in _ENGINES:
        raise InputError(one_of("engine", str(options.engine), _ENGINES))
    source = source_of(options)
    engine: Engine | None = None
    if options.engine == "ray":
        from polyseme.analysis.ray_engine import RayEngine

        engine = RayEngine(options, source)
    elif options.address is not None or options.workers is not None:
        raise InputError(
            "address and workers apply only to engine='ray'; leave them out, or give engine='ray'."
        )
    return run_analysis(options, source, engine)
