// The search page. All texts of the index are set as text, never as HTML.
const $ = (selector, inside = document) => inside.querySelector(selector);
const form = $('#search'), query = $('#query'), list = $('#results'), file = $('#file');
let about = null;
let current = 0; // number of the newest search: answers of older ones are dropped
let playing = null;

async function api(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error('The server does not answer. Is atr-scale serve still running?');
  }
  if (answer.ok) return answer.status === 204 ? null : answer.json();
  const { detail } = await answer.json().catch(() => ({ detail: answer.statusText }));
  throw new Error(detail[0].toUpperCase() + detail.slice(1) + '.');
}

const address = (path, values) => `/api/${path}?${new URLSearchParams(values)}`;
const seconds = (value) => (value < 10 ? value.toFixed(1) : value.toFixed(0)) + ' s';

function clock(value) {
  const minutes = Math.floor(value / 60);
  const rest = value - 60 * minutes;
  return minutes >= 60
    ? `${Math.floor(minutes / 60)}:${String(minutes % 60).padStart(2, '0')}:${String(Math.floor(rest)).padStart(2, '0')}`
    : `${minutes}:${rest.toFixed(1).padStart(4, '0')}`;
}

function say(text, busy = false) {
  $('#status').textContent = text;
  $('#status').classList.toggle('busy', busy);
}

function fail(text) {
  $('#error').textContent = text;
  $('#error').hidden = !text;
}

// ---- searches

async function search(text, show, load) {
  const number = ++current;
  fail('');
  say(`Searching for ${text} …`, true);
  list.classList.add('stale');
  list.setAttribute('aria-busy', 'true');
  const began = performance.now();
  try {
    const { results } = await load();
    if (number !== current) return;
    const took = Math.round(performance.now() - began);
    stop();
    list.replaceChildren(...results.map((result, index) => card(result, index + 1, show)));
    $('#empty').hidden = true;
    say(results.length ? `${results.length} results for ${text} in ${took} ms` : `Nothing was found for ${text}.`);
  } catch (error) {
    if (number !== current) return;
    list.replaceChildren();
    say('');
    fail(error.message);
  } finally {
    if (number === current) {
      list.classList.remove('stale');
      list.removeAttribute('aria-busy');
    }
  }
}

function options() {
  return { top: $('#top').value, ...($('#captions').value ? { captions: 'true' } : {}) };
}

function searchText(remember = true) {
  const text = query.value.trim();
  if (!text) return home(remember);
  const values = { q: text, ...options() };
  if (remember) history.pushState(null, '', '/?' + new URLSearchParams(values));
  document.title = `${text} – Sound search`;
  return search(`“${text}”`, text, () => api(address('search', values)));
}

function home(remember) {
  current++;
  stop();
  list.replaceChildren();
  list.classList.remove('stale');
  fail('');
  say('');
  $('#empty').hidden = false;
  if (remember) history.pushState(null, '', '/');
  document.title = 'Sound search';
}

let dropped = null; // the sound that was searched by

function searchSound(sound) {
  dropped = sound;
  query.value = '';
  if (sound.size > about.max_upload_bytes) {
    current++;
    list.replaceChildren();
    say('');
    return fail(`${sound.name} is too large: give at most ${about.max_upload_bytes >> 20} MiB.`);
  }
  history.pushState(null, '', '/');
  document.title = `${sound.name} – Sound search`;
  return search(`the sound ${sound.name}`, null, () =>
    api(address('search/audio', { name: sound.name, ...options() }), {
      method: 'POST', body: sound, headers: { 'Content-Type': sound.type || 'application/octet-stream' },
    }));
}

function again() {
  if (query.value.trim()) searchText();
  else if (dropped && list.childElementCount) searchSound(dropped);
}

function fromAddress() {
  const values = new URLSearchParams(location.search);
  query.value = values.get('q') ?? '';
  if ([...$('#top').options].some((option) => option.value === values.get('top'))) $('#top').value = values.get('top');
  $('#captions').value = about.has_captions && values.get('captions') ? 'true' : '';
  searchText(false);
}

// ---- one result

const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    seen.unobserve(entry.target);
    entry.target.load();
  }
}, { rootMargin: '400px' });
const resized = new ResizeObserver((entries) => entries.forEach((entry) => entry.target.draw?.()));
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () =>
  document.querySelectorAll('canvas').forEach((canvas) => canvas.draw?.()));

function card(result, rank, text) {
  const item = $('#card').content.firstElementChild.cloneNode(true);
  const name = result.caption || result.path.split(/[/#]/).pop();
  $('.rank', item).textContent = rank;
  $('h2', item).textContent = name;
  const place = result.start === null ? '' : ` · ${clock(result.start)} – ${clock(result.stop)}`;
  $('.path', item).textContent = result.path + place;
  $('.score', item).append('score ', Object.assign(document.createElement('b'), { textContent: result.score.toFixed(3) }));
  item.setAttribute('aria-label', `Result ${rank}: ${name}`);
  const player = setUpPlayer(item, result);
  setUpMarks(item, result, text);
  item.load = async () => {
    $('.mel', item).src = address('spectrogram.png', { id: result.id });
    try {
      const shape = await api(address('sound', { id: result.id }));
      player.shape(shape);
      if (text && about.has_moments) drawMoments(item, await moments(text, result.id), shape, player);
    } catch (error) {
      trouble(item, error.message);
    }
  };
  seen.observe(item);
  return item;
}

function trouble(item, text) {
  $('.trouble', item).textContent = text;
  $('.trouble', item).hidden = !text;
}

function setUpPlayer(item, result) {
  const audio = $('audio', item), play = $('.play', item), seek = $('.seek', item), over = $('.over', item);
  let total = 0, start = result.start ?? 0, until = Infinity;
  audio.src = address('sound.wav', { id: result.id });

  const show = () => {
    const at = audio.currentTime;
    if (total) $('.head-line', item).style.left = `${(100 * Math.min(at, total)) / total}%`;
    $('.clock', item).textContent = clock(start + at);
    seek.value = at;
    seek.setAttribute('aria-valuetext', `${(start + at).toFixed(1)} seconds`);
  };
  const follow = () => {
    show();
    if (audio.currentTime >= until) audio.pause();
    if (!audio.paused) requestAnimationFrame(follow);
  };
  const go = (at) => {
    item.classList.add('touched');
    until = Infinity;
    audio.currentTime = Math.max(0, Math.min(at, total));
    show();
  };
  play.addEventListener('click', () => {
    until = Infinity;
    if (audio.paused) audio.play().catch(() => {});
    else audio.pause();
  });
  audio.addEventListener('play', () => {
    if (playing && playing !== audio) playing.pause();
    playing = audio;
    item.classList.add('playing', 'touched');
    play.setAttribute('aria-label', 'Pause');
    requestAnimationFrame(follow);
  });
  for (const event of ['pause', 'ended'])
    audio.addEventListener(event, () => {
      item.classList.remove('playing');
      play.setAttribute('aria-label', 'Play');
      show();
    });
  audio.addEventListener('error', () => trouble(item, 'The sound cannot be played.'));
  seek.addEventListener('input', () => go(Number(seek.value)));
  over.addEventListener('pointerdown', (event) => {
    if (event.button) return;
    const move = (moved) => {
      const box = over.getBoundingClientRect();
      go((total * (moved.clientX - box.left)) / box.width);
    };
    move(event);
    over.setPointerCapture(event.pointerId);
    over.addEventListener('pointermove', move);
    for (const end of ['pointerup', 'pointercancel'])
      over.addEventListener(end, () => over.removeEventListener('pointermove', move), { once: true });
  });
  $('.clock', item).textContent = clock(start);
  return {
    shape(shape) {
      total = shape.seconds;
      start = shape.start;
      seek.max = total;
      drawWave($('.wave', item), shape.peaks);
      drawTicks($('.ticks', item), start, total);
    },
    playPart(from, to) {
      go(from);
      until = to;
      audio.play().catch(() => {});
    },
  };
}

function stop() {
  playing?.pause();
  playing = null;
}

function setUpMarks(item, result, text) {
  const buttons = [...item.querySelectorAll('.marks [data-mark]')];
  if (text === null) return $('.marks', item).remove();
  const show = () => {
    item.classList.remove('right', 'wrong');
    if (result.mark) item.classList.add(result.mark);
    for (const button of buttons) button.setAttribute('aria-pressed', String(button.dataset.mark === result.mark));
  };
  for (const button of buttons)
    button.addEventListener('click', async () => {
      const mark = button.dataset.mark === result.mark ? null : button.dataset.mark;
      buttons.forEach((other) => (other.disabled = true));
      try {
        await api('/api/mark', {
          method: 'PUT', body: JSON.stringify({ query: text, id: result.id, mark }),
          headers: { 'Content-Type': 'application/json' },
        });
        result.mark = mark;
        trouble(item, '');
        show();
      } catch (error) {
        trouble(item, error.message);
      }
      buttons.forEach((other) => (other.disabled = false));
      button.focus();
    });
  show();
}

// ---- drawings; all have the time from left to right over the same width

function painted(canvas, paint) {
  canvas.draw = () => {
    const ratio = devicePixelRatio, width = canvas.clientWidth, height = canvas.clientHeight;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    const context = canvas.getContext('2d');
    context.scale(ratio, ratio);
    paint(context, width, height, getComputedStyle(canvas));
  };
  resized.observe(canvas); // also draws it the first time
}

function drawWave(canvas, peaks) {
  const loudest = Math.max(1e-4, ...peaks.map(([low, high]) => Math.max(high, -low)));
  painted(canvas, (context, width, height, style) => {
    context.fillStyle = style.getPropertyValue('--wave');
    const step = width / peaks.length, scale = (0.92 * height) / 2 / loudest;
    peaks.forEach(([low, high], index) => {
      const top = height / 2 - high * scale;
      context.fillRect(index * step, top, Math.max(step * 0.75, 0.6), Math.max((high - low) * scale, 1));
    });
  });
}

function drawTicks(place, start, total) {
  const steps = [0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300];
  const step = steps.find((size) => total / size <= 8) ?? 600;
  const ticks = [];
  for (let at = Math.ceil(start / step - 1e-6) * step; at <= start + total + 1e-6; at += step) {
    const tick = document.createElement('span');
    tick.textContent = start + total >= 60 ? clock(at).replace(/\.0$/, '') : `${Number(at.toFixed(1))} s`;
    const share = (at - start) / total;
    tick.style.left = `${100 * share}%`;
    if (share > 0.97) tick.className = 'last';
    ticks.push(tick);
  }
  place.replaceChildren(...ticks);
}

// ---- moments

const known = new Map();

function moments(text, id) {
  const key = JSON.stringify([text, id]);
  if (!known.has(key)) {
    const asked = api(address('moments', { q: text, id }));
    known.set(key, asked);
    asked.catch(() => known.delete(key));
  }
  return known.get(key);
}

function lane(name, weights, times, total, whole) {
  const row = document.createElement('div');
  row.className = whole ? 'lane whole' : 'lane';
  const label = document.createElement('span');
  label.className = 'name';
  label.textContent = label.title = name;
  const canvas = document.createElement('canvas');
  row.append(label, canvas);
  painted(canvas, (context, width, height, style) => {
    const colour = style.getPropertyValue('--moment');
    weights.forEach((weight, index) => {
      const [from, to] = times[index];
      context.fillStyle = `rgb(${colour} / ${Math.max(0, Math.min(1, weight))})`;
      const left = (from / total) * width;
      context.fillRect(left, 0, Math.max(1, (to / total) * width - left) + 0.3, height);
    });
  });
  return row;
}

function drawMoments(item, found, shape, player) {
  const rows = found.words.map((word, index) => lane(word, found.weights[index], found.times, shape.seconds, false));
  const place = $('.moments', item);
  place.replaceChildren(...rows);
  place.hidden = false;
  const strongest = found.words.map((word, index) => {
    const peak = found.weights[index].indexOf(Math.max(...found.weights[index]));
    return `${word} at ${(shape.start + found.times[peak][0]).toFixed(1)} seconds`;
  });
  place.setAttribute('role', 'img');
  place.setAttribute('aria-label', `Moments of the words: ${strongest.join(', ')}`);
  if (!found.spans.length) return;
  const spans = document.createElement('div');
  spans.className = 'spans';
  for (const span of found.spans.slice(0, 3)) {
    const button = document.createElement('button');
    button.type = 'button';
    const from = shape.start + span.start, to = shape.start + span.stop;
    button.textContent = `${from.toFixed(1)} – ${seconds(to)}`;
    button.setAttribute('aria-label', `Play the moment from ${from.toFixed(1)} to ${to.toFixed(1)} seconds`);
    button.addEventListener('click', () => player.playPart(span.start, span.stop));
    spans.append(button);
  }
  $('.marks', item).append(spans);
}

// ---- start

form.addEventListener('submit', (event) => {
  event.preventDefault();
  searchText();
});
file.addEventListener('change', () => {
  if (file.files.length) searchSound(file.files[0]);
  file.value = '';
});
$('#top').addEventListener('change', again);
$('#captions').addEventListener('change', again);
addEventListener('popstate', fromAddress);
let depth = 0; // dragenter and dragleave come for every element on the way
addEventListener('dragenter', (event) => {
  if (event.dataTransfer?.types.includes('Files')) $('#drop').hidden = ++depth === 0;
});
addEventListener('dragleave', () => ($('#drop').hidden = (depth = Math.max(0, depth - 1)) === 0));
addEventListener('dragover', (event) => event.preventDefault());
addEventListener('drop', (event) => {
  event.preventDefault();
  depth = 0;
  $('#drop').hidden = true;
  if (event.dataTransfer.files.length) searchSound(event.dataTransfer.files[0]);
});

try {
  about = await api('/api/about');
  $('#about').textContent = `${about.sounds.toLocaleString('en')} sounds · ${about.name}`;
  $('#in').hidden = !about.has_captions;
  $('#marks').textContent = `Marks are saved in ${about.marks_file}`;
  file.accept = about.upload_types.map((type) => '.' + type).join(',');
  $('#examples').append(...about.examples.map((text) => {
    const row = document.createElement('li'), button = document.createElement('button');
    button.type = 'button';
    button.textContent = text;
    button.addEventListener('click', () => {
      query.value = text;
      searchText();
    });
    row.append(button);
    return row;
  }));
  fromAddress();
} catch (error) {
  fail(error.message);
}
