"""Compare the SAEs of a root, and choose latents to look at.

    marimo edit metrics.py -- --root ./saev-out

It needs `pip install 'saevit[notebooks]'`. All data comes from `saev.tables`.
"""

import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="saev: metrics")


@app.cell
def _():
    import math

    import altair as alt
    import marimo as mo
    import numpy as np
    import pandas as pd

    from saev import tables, visuals
    from saev.config import VisualsConfig
    from saev.errors import SaevError

    return SaevError, VisualsConfig, alt, math, mo, np, pd, tables, visuals


@app.cell
def _(mo):
    # URL of the folder that holds `runs` and `shards`
    root = str(mo.cli_args().get("root") or "./saev-out")
    return (root,)


@app.cell
def _(mo):
    again = mo.ui.run_button(label="Read again", tooltip="after more training or inference")
    return (again,)


@app.cell
def _(SaevError, again, mo, root, tables):
    _ = again.value  # a click runs this cell
    try:
        every_sae = tables.saes(root).to_pandas()
    except SaevError as err:
        mo.stop(True, mo.callout(mo.md(f"{err}"), kind="danger"))
    mo.stop(
        every_sae.empty,
        mo.callout(
            mo.md(
                f"There is no complete SAE below `{root}/runs`. Name another root: "
                "`marimo edit metrics.py -- --root URL`, or train one: `saev train --help`."
            ),
            kind="warn",
        ),
    )
    return (every_sae,)


@app.cell
def _(again, every_sae, mo, root):
    _n = every_sae.run.nunique()
    mo.hstack([mo.md(f"# {_n} SAE{'s' * (_n != 1)} of `{root}`"), again], justify="space-between")
    return


@app.cell
def _(every_sae, mo):
    SIDES = {
        "held-out": "held-out images, which training has not seen",
        "elsewhere": "images of another folder than that of training",
        "all": "all images, those of training among them",
    }
    _names = {
        f"{shards.rsplit('/', 1)[-1]}: {SIDES[side]}": shards
        for side in SIDES
        for shards in every_sae.shards[every_sae.side == side].dropna().unique()
    }
    measured_on = mo.ui.dropdown(_names, value=next(iter(_names), None), label="Measured on")
    measured_on
    return SIDES, measured_on


@app.cell
def _(every_sae, measured_on):
    saes = every_sae[every_sae.shards == measured_on.value].reset_index(drop=True)
    saes["kind"] = saes.activation + " " + saes.objective.where(saes.objective != "vanilla", "")
    saes["dead_share"] = saes.n_dead / saes.d_sae
    side = saes.side.iloc[0] if len(saes) else "all"
    return saes, side


@app.cell
def _(SIDES, alt, mo, saes, side):
    _base = alt.Chart(saes).encode(
        x=alt.X("l0", title="L0: latents that fire per token")
        .axis(tickCount=10)
        .scale(zero=False, padding=24),
        y=alt.Y("nmse", title="NMSE: error over variance").scale(zero=False, padding=24),
    )
    _points = _base.mark_point(filled=True, size=110, opacity=1).encode(
        color=alt.Color("kind", title=None).scale(scheme="tableau10"),
        tooltip=[
            alt.Tooltip("name", title="SAE"),
            alt.Tooltip("nmse", title="NMSE", format=".4f"),
            alt.Tooltip("l0", title="L0", format=".1f"),
            alt.Tooltip("training_nmse", title="NMSE of training", format=".4f"),
            alt.Tooltip("dead_share", title="dead", format=".1%"),
            alt.Tooltip("d_sae", title="latents"),
            alt.Tooltip("layer"),
            alt.Tooltip("lr", title="learning rate", format="~g"),
            alt.Tooltip("tag"),
            alt.Tooltip("run"),
        ],
    )
    _front = _base.transform_filter("datum.on_front").mark_line(
        strokeDash=[4, 4], color="#98a2b3", strokeWidth=1.5
    )
    _names = _base.mark_text(align="left", dx=9, dy=-9, color="#475467").encode(text="name")
    _layers = [_front, _points, _names] if len(saes) <= 20 else [_front, _points]
    mo.vstack(
        [
            mo.md(
                f"## Error and sparsity\n\nOf {SIDES[side]}. Lower and further left is better; the "
                "line joins the SAEs that no other one beats in both. Point at one for its figures."
            ),
            alt.layer(*_layers).properties(width="container", height=340),
        ]
    )
    return


@app.cell
def _(alt, mo, saes, side):
    def share(column, title, limit):
        """Bars of a share of the latents, one for each SAE."""
        return (
            alt.Chart(saes, title=alt.Title(title, anchor="start", fontWeight="normal"))
            .mark_bar(height={"band": 0.6}, color="#4c78a8")
            .encode(
                x=alt.X(column, title=None, axis=alt.Axis(format="~%", tickCount=4)).scale(
                    domain=[0, limit]
                ),
                y=alt.Y("name", title=None, sort=list(saes.name)).axis(labelLimit=260),
                tooltip=["name", alt.Tooltip(column, format=".2%"), alt.Tooltip("d_sae")],
            )
            .properties(width=330, height={"step": 26})
        )

    def limit(column):
        """The end of an axis."""
        highest = saes[column].max()
        return float(highest) * 1.05 if highest > 0 else 0.01

    _shares = [share("dead_share", f"Dead: never fire on {side} images", limit("dead_share"))]
    if saes.dense_share.notna().any():
        _dense = "Dense: fire over 10 times as often as the mean, all images"
        _shares.append(share("dense_share", _dense, limit("dense_share")))
    mo.vstack(
        [mo.md("## Dead and dense latents"), mo.hstack(_shares, justify="start", gap=2, wrap=True)]
    )
    return


@app.cell
def _(SaevError, mo, saes, tables):
    def _curve(sae):
        try:
            return tables.curves(sae.run).to_pandas().assign(name=sae.name)
        except SaevError:
            return None  # a run of another program, without curves

    _found = [_curve(sae) for sae in saes.itertuples()]
    curves = [curve for curve in _found if curve is not None and len(curve)]
    mo.stop(not curves)
    _keys = [key for key in curves[0].columns if key.startswith("train/")]
    figure = mo.ui.dropdown(_keys, value="train/normalized_mse", label="Figure")
    mo.vstack([mo.md("## Training"), figure])
    return curves, figure


@app.cell
def _(alt, curves, figure, pd):
    _long = pd.concat([c[["step", "name", figure.value]] for c in curves if figure.value in c])
    _long = _long.rename(columns={figure.value: "value"}).dropna()
    _is_log = bool((_long.value > 0).all()) and _long.value.max() > 10 * _long.value.min()
    alt.Chart(_long).mark_line(strokeWidth=1.5).encode(
        x=alt.X("step", title="step").axis(tickCount=8),
        y=alt.Y("value", title=figure.value).scale(type="log" if _is_log else "linear", zero=False),
        color=alt.Color("name", title=None).scale(scheme="tableau10"),
        tooltip=["name", "step", alt.Tooltip("value", format=".4g")],
    ).properties(width="container", height=260)
    return


@app.cell
def _(mo, root, saes):
    _measured = saes[saes.inference.notna()]
    mo.stop(
        _measured.empty,
        mo.callout(
            mo.md(f"No SAE is measured yet. Do it with `saev inference --runs {root}/runs`."),
            kind="warn",
        ),
    )
    _options = {row.name: row.Index for row in saes[["name"]].loc[_measured.index].itertuples()}
    chosen = mo.ui.dropdown(_options, value=next(iter(_options)), label="SAE")
    mo.vstack(
        [
            mo.md(
                "## Latents\n\nEach point is a latent: on what share of the tokens it fires, and "
                "how strongly where it does. Rare and strong ones are often about one thing."
            ),
            chosen,
        ]
    )
    return (chosen,)


@app.cell
def _(chosen, mo, saes, tables):
    sae = saes.loc[chosen.value]
    _columns = ["latent", "frequency", "count", "mean_value", "max_value"]
    every_latent = tables.latents(sae.inference).select(_columns).to_pandas()
    latents = every_latent[(every_latent.frequency > 0) & (every_latent.mean_value > 0)]
    mo.stop(latents.empty, mo.callout(mo.md("All latents of this SAE are dead."), kind="warn"))
    return every_latent, latents, sae


@app.cell
def _(VisualsConfig, mo, sae, visuals):
    def command(**keys):
        """The command that draws latents of the chosen SAE."""
        cfg = VisualsConfig(run=sae.run, shards=sae.shards, inference=sae.inference, **keys)
        return visuals.command(cfg)

    def table(frame):
        """Latents, five at a time."""
        numbers = dict.fromkeys(("frequency", "mean_value", "max_value"), "{:.4g}".format)
        return mo.ui.table(
            frame.reset_index(drop=True), page_size=5, selection=None, format_mapping=numbers,
            show_column_summaries=False,
        )  # fmt: skip

    return command, table


@app.cell
def _(alt, math):
    def log_axis(frame, column, title):
        """A log axis with few lines, from a bit below the data to a bit above."""
        low, high = (math.log10(frame[column].agg(of)) for of in ("min", "max"))
        digits = (1, 2, 5) if high - low < 2.5 else (1,)
        decades = range(math.floor(low) - 1, math.ceil(high) + 1)
        values = [digit * 10.0**n for n in decades for digit in digits]
        axis = alt.Axis(values=values, format="~g", gridColor="#eaecf0")
        edges = [10 ** (low - 0.15), 10 ** (high + 0.15)]
        scale = alt.Scale(type="log", domain=edges, nice=False)
        return {"title": title, "axis": axis, "scale": scale}

    def scatter(frame):
        """Frequency × mean value of latents."""
        return (
            alt.Chart(frame)
            .mark_circle(size=36 if len(frame) < 5000 else 12, opacity=0.55)
            .encode(
                x=alt.X("frequency", **log_axis(frame, "frequency", "Frequency: share of tokens")),
                y=alt.Y("mean_value", **log_axis(frame, "mean_value", "Mean value where it fires")),
                tooltip=[
                    "latent",
                    alt.Tooltip("frequency", format=".3g"),
                    alt.Tooltip("mean_value", title="mean value", format=".3g"),
                    alt.Tooltip("max_value", title="largest value", format=".3g"),
                ],
            )
            .properties(width="container", height=420)
        )

    return (scatter,)


@app.cell
def _(every_latent, latents, mo, scatter):
    brush = mo.ui.altair_chart(scatter(latents), chart_selection="interval", legend_selection=False)
    _left_out = len(every_latent) - len(latents)
    mo.vstack(
        [
            mo.md(
                "### Draw a rectangle\n\nDrag over the latents that you want to see. "
                f"Dead and not shown: {_left_out:,} of {len(every_latent):,}."
            ),
            brush,
        ]
    )
    return (brush,)


@app.cell
def _(brush, command, mo, table):
    # The latents in the rectangle, a data frame
    brushed = brush.value
    brush_command = (
        command(latents=tuple(map(int, brushed.latent)), n_latents=0) if len(brushed) else ""
    )
    _shown = mo.vstack(
        [
            mo.md(f"**{len(brushed):,} latents.** This draws them:\n\n```sh\n{brush_command}\n```"),
            table(brushed),
        ]
    )
    _shown if len(brushed) else mo.md("*No latents are chosen.*")
    return brush_command, brushed


@app.cell
def _(VisualsConfig, latents, math, mo):
    def slider(column, key, label):
        """A slider for the log10 of a column, at the default of `saev visuals` if that fits."""
        low = math.floor(10 * math.log10(latents[column].min())) / 10
        high = max(math.ceil(10 * math.log10(latents[column].max())) / 10, low + 0.1)
        n = round((high - low) / 0.05)
        steps = [round(low + 0.05 * i, 2) for i in range(n + 1)]
        first, last = VisualsConfig.model_fields[key].default
        inside = [step for step in steps if first <= step <= last] or steps
        return mo.ui.range_slider(
            steps=steps,
            value=[inside[0], inside[-1]],
            label=label,
            full_width=True,
        )

    frequency_range = slider("frequency", "log_freq_range", "log10 of the frequency")
    value_range = slider("mean_value", "log_value_range", "log10 of the mean value")
    mo.vstack(
        [
            mo.md(
                "### Or set thresholds\n\nThey are those of `saev visuals`, which draws latents "
                "from such a range by itself. A lower `--n-latents` draws a spread over the range."
            ),
            frequency_range,
            value_range,
        ]
    )
    return frequency_range, value_range


@app.cell
def _(command, frequency_range, latents, np, value_range):
    _frequency, _value = np.log10(latents.frequency), np.log10(latents.mean_value)
    _is_within = _frequency.between(*frequency_range.value) & _value.between(*value_range.value)
    # The latents between the thresholds, a data frame
    within = latents[_is_within]
    threshold_command = command(
        n_latents=len(within),
        log_freq_range=tuple(frequency_range.value),
        log_value_range=tuple(value_range.value),
    )
    return threshold_command, within


@app.cell
def _(
    alt, frequency_range, latents, mo, pd, scatter, table, threshold_command, value_range, within
):
    _edges = pd.DataFrame(
        [[10**edge for edge in (*frequency_range.value, *value_range.value)]],
        columns=["x", "x2", "y", "y2"],
    )
    _box = (
        alt.Chart(_edges)
        .mark_rect(fill="#f79009", fillOpacity=0.08, stroke="#f79009", clip=True)
        .encode(x="x", x2="x2", y="y", y2="y2")
    )
    _points = scatter(latents.assign(within=latents.latent.isin(within.latent))).encode(
        color=alt.condition("datum.within", alt.value("#dc6803"), alt.value("#98a2b3"))
    )

    def _percent(end):
        return f"{100 * 10 ** frequency_range.value[end]:.3g}%"

    def _mean(end):
        return f"{10 ** value_range.value[end]:.3g}"

    mo.vstack(
        [
            alt.layer(_points, _box).properties(width="container", height=420),
            mo.md(
                f"**{len(within):,} of {len(latents):,} latents** fire on {_percent(0)} to "
                f"{_percent(1)} of the tokens, with a mean value of {_mean(0)} to {_mean(1)}. "
                "This draws them:\n\n"
                f"```sh\n{threshold_command}\n```"
            ),
            table(within),
        ]
    )
    return


if __name__ == "__main__":
    app.run()
