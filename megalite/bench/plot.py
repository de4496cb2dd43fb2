"""A report as a picture: speed by sequence length, a panel a mode. Needs matplotlib, which is loaded here alone."""

import io

from megalite.bench.results import UNITS, Report


def png(report: Report) -> bytes:
    """Lines over sequence lengths, with the spread; bars where there is only one."""
    from matplotlib.figure import Figure  # which needs no display

    rows = [row for row in report.rows if row.rate is not None]
    modes = list(dict.fromkeys(row.mode for row in report.rows))
    names = list(dict.fromkeys(row.implementation for row in report.rows))
    lengths = sorted({row.sequence_length for row in report.rows})
    unit, scale = UNITS[report.rows[0].of]
    figure = Figure(figsize=(5.2 * len(modes), 4.2), layout="constrained")
    figure.suptitle(
        f"{report.rows[0].op}, {report.rows[0].shape}: {report.machine['device']}, {report.machine['dtype']}"
    )
    for mode, axes in zip(modes, figure.subplots(1, len(modes), squeeze=False)[0], strict=True):
        for i, name in enumerate(names):
            mine = sorted(
                (r for r in rows if (r.mode, r.implementation) == (mode, name)), key=lambda r: r.sequence_length
            )
            speeds = [(r.rate or 0.0) / scale for r in mine]
            if len(lengths) == 1:
                axes.barh(name, speeds[0] if speeds else 0.0, color=f"C{i}")
                continue
            places = [r.sequence_length for r in mine]
            axes.plot(places, speeds, marker="o", markersize=4, label=name, color=f"C{i}")
            bounds = [[s * (r.median or 0.0) / t for r, s in zip(mine, speeds, strict=True) for t in [getattr(r, end)]]
                      for end in ("high", "low")]  # fmt: skip
            axes.fill_between(places, *bounds, color=f"C{i}", alpha=0.15)
        axes.set_title(mode)
        axes.set_xlabel(unit if len(lengths) == 1 else "sequence length")
        if len(lengths) == 1:
            axes.invert_yaxis()
            continue
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.set_ylim(bottom=0)
        axes.set_ylabel(unit)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=130)
    return data.getvalue()
