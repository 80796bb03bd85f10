/* SPDX-License-Identifier: Apache-2.0 */
#include "tui/ui.h"

#include <string.h>

static struct view *selected(const struct ui *ui)
{
	return ui->selected < ui->nviews ? ui->view[ui->selected] : NULL;
}

static void ask(struct ui *ui, enum ui_mode mode)
{
	struct view *v = selected(ui);
	if (!v || v->ended)
		return;
	ui->mode = mode;
	ui->target = v;
	ui->input[0] = '\0';
}

static enum ui_action watch_key(struct ui *ui, int key)
{
	switch (key) {
	case 'q':
	case 'Q':
		return UI_LEAVE;
	case 'c':
	case 'C':
		ask(ui, UI_CONFIRM);
		break;
	case 'b':
	case 'B':
		ask(ui, UI_BANDWIDTH);
		break;
	case UI_KEY_UP:
	case 'k':
		if (ui->selected)
			ui->selected--;
		break;
	case UI_KEY_DOWN:
	case 'j':
	case '\t':
		if (ui->selected + 1 < ui->nviews)
			ui->selected++;
		else if (key == '\t')
			ui->selected = 0;
		break;
	default:
		break;
	}
	return UI_NONE;
}

static enum ui_action prompt_key(struct ui *ui, int key)
{
	size_t len = strlen(ui->input);
	if (key == UI_KEY_ESCAPE) {
		ui->mode = UI_WATCH;
	} else if (key == UI_KEY_ENTER || key == '\r') {
		ui->mode = UI_WATCH;
		return len ? UI_TUNE : UI_NONE;
	} else if ((key == UI_KEY_BACKSPACE || key == '\b') && len) {
		ui->input[len - 1] = '\0';
	} else if (((key >= '0' && key <= '9') || (key < 128 && strchr("kKmMgGtT", key) && key)) &&
		   len + 1 < sizeof ui->input) {
		ui->input[len] = (char)key;
		ui->input[len + 1] = '\0';
	}
	return UI_NONE;
}

enum ui_action ui_key(struct ui *ui, int key)
{
	/* what was asked about has ended meanwhile */
	if (ui->mode != UI_WATCH && ui->target->ended)
		ui->mode = UI_WATCH;
	if (ui->mode == UI_WATCH)
		return watch_key(ui, key);
	if (ui->mode == UI_BANDWIDTH)
		return prompt_key(ui, key);
	/* anything but a clear yes is a no */
	ui->mode = UI_WATCH;
	return key == 'y' || key == 'Y' ? UI_CANCEL : UI_NONE;
}
