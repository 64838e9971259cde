// Runs once in each context that expressions run in, before any of them: takes away what upstream does
// not have or does not allow, and freezes the rest, so that no expression can leave anything behind.
(function (global) {
  'use strict';

  const kept = new Set([
    'AggregateError', 'Array', 'ArrayBuffer', 'BigInt', 'BigInt64Array', 'BigUint64Array', 'Boolean',
    'DataView', 'Date', 'Error', 'EvalError', 'Float32Array', 'Float64Array', 'Infinity', 'Int16Array',
    'Int32Array', 'Int8Array', 'JSON', 'Map', 'Math', 'NaN', 'Number', 'Object', 'Promise',
    'RangeError', 'ReferenceError', 'RegExp', 'Set', 'String', 'Symbol', 'SyntaxError', 'TypeError',
    'URIError', 'Uint16Array', 'Uint32Array', 'Uint8Array', 'Uint8ClampedArray', 'WeakMap', 'WeakSet',
    'decodeURI', 'decodeURIComponent', 'encodeURI', 'encodeURIComponent', 'isFinite', 'isNaN',
    'parseFloat', 'parseInt', 'undefined',
  ]);
  const blocked = [
    'eval', 'Function', 'require', 'module', 'exports', '__dirname', '__filename', 'global', 'globalThis',
    'process', 'setTimeout', 'setInterval', 'setImmediate', 'clearTimeout', 'clearInterval',
    'clearImmediate', 'console', '__proto__', '__defineGetter__', '__defineSetter__', '__lookupGetter__',
    '__lookupSetter__', 'constructor', 'import', 'importScripts', 'Reflect', 'Proxy', 'defineProperty',
    'getOwnPropertyDescriptor', 'getPrototypeOf', 'setPrototypeOf', 'escape', 'unescape',
  ];

  const roots = [
    function () {}, () => {}, function* () {}, async function () {}, async function* () {},
    [][Symbol.iterator](), ''[Symbol.iterator](), new Map()[Symbol.iterator](),
    new Set()[Symbol.iterator](), ''.matchAll(/a/g), (function* () {})(), (async function* () {})(),
    (function () { return arguments; })(), Promise.resolve(),
  ];
  // Helpers of iterators, and what makes an iterator of something else.
  const iterator = [].values();
  if (iterator.map) roots[roots.length] = iterator.map(() => 0);
  const { constructor: Iterator } = Object.getPrototypeOf(Object.getPrototypeOf(iterator));
  if (Iterator.from) roots[roots.length] = Iterator.from({ next: () => ({ done: true }) });

  // What is built in runs for as long as it takes: the engine looks at the time between the steps of a
  // script only, and seldom. So what can take long is bounded by how much it is given, and looks itself.
  const tick = global.$headgate_tick;
  const { apply } = Reflect;
  const { isArray, prototype: { flat } } = Array;
  const { isView } = ArrayBuffer;
  const { getOwnPropertyDescriptor, getPrototypeOf, defineProperty } = Object;
  const LONGEST = 4e6;

  function size(of) {
    return typeof of === 'string' || isArray(of) || isView(of) ? of.length || 0 : 0;
  }

  // The same of anything that list methods take for a list. A length that changes as it is looked at
  // would get around the bound.
  function listSize(of) {
    if (of === null || typeof of !== 'object' && typeof of !== 'function') return 0;
    if (isArray(of) || isView(of)) return size(of);
    for (let owner = of; owner !== null; owner = getPrototypeOf(owner)) {
      const property = getOwnPropertyDescriptor(owner, 'length');
      if (property === undefined) continue;
      const { value } = property;
      if (typeof value === 'number' || typeof value === 'string') return +value || 0;
      throw new TypeError('a length must be a number');
    }
    return 0;
  }

  function within(amount, bound) {
    tick();
    if (amount > bound) throw new RangeError('too much for one call');
  }

  function wrap(owner, name, before) {
    const original = owner[name];
    const wrapped = {
      method(...args) {
        before(this, args);
        return apply(original, this, args);
      },
    }.method;
    defineProperty(wrapped, 'name', { value: name });
    defineProperty(wrapped, 'length', { value: original.length });
    defineProperty(owner, name, { value: wrapped });
  }

  const sizes = (args) => {
    let sum = 0;
    for (let at = 0; at < args.length; at++) sum += size(args[at]);
    return sum;
  };
  const TypedArray = getPrototypeOf(Uint8Array);
  for (const owner of [Array.prototype, TypedArray.prototype]) {
    for (const name of Object.getOwnPropertyNames(owner)) {
      if (name === 'constructor' || name === 'flat') continue;
      if (typeof getOwnPropertyDescriptor(owner, name).value !== 'function') continue;
      const bound = /ort/.test(name) ? LONGEST / 16 : LONGEST;
      wrap(owner, name, (self, args) => {
        within(listSize(self) + (name === 'concat' ? sizes(args) : 0), bound);
      });
    }
  }
  // The same list may be in itself many times over: no length bounds that.
  defineProperty(Array.prototype, 'flat', {
    value: {
      flat(depth) {
        if (!isArray(this)) return apply(flat, [], []);
        const result = [];
        (function append(list, depth) {
          within(list.length, LONGEST);
          for (let at = 0; at < list.length; at++) {
            if (!(at in list)) continue;
            if (depth >= 1 && isArray(list[at])) append(list[at], depth - 1);
            else result[result.length] = list[at];
          }
        })(this, depth === undefined ? 1 : +depth);
        return result;
      },
    }.flat,
  });
  for (const [owner, names] of [
    [Array, ['from', 'of']],
    [JSON, ['parse', 'stringify']],
    [Object, ['keys', 'values', 'entries', 'assign', 'fromEntries', 'getOwnPropertyNames', 'freeze']],
    [String, ['raw', 'fromCharCode', 'fromCodePoint']],
    [global, ['encodeURIComponent', 'encodeURI', 'decodeURIComponent', 'decodeURI', 'parseInt', 'parseFloat']],
  ]) {
    for (const name of names) {
      wrap(owner, name, (_, args) => {
        if (name === 'raw') within(size(Object(args[0]).raw), LONGEST);
        else within(owner === Array ? listSize(args[0]) : sizes(args), LONGEST);
      });
    }
  }
  const texts = String.prototype;
  for (const name of Object.getOwnPropertyNames(texts)) {
    if (name === 'constructor' || typeof texts[name] !== 'function') continue;
    const original = texts[name];
    const isSearch = ['indexOf', 'lastIndexOf', 'includes', 'split', 'replace', 'replaceAll'].includes(name);
    const wrapped = {
      method(...args) {
        tick();
        const self = this === null || this === undefined || typeof this === 'string' ? this : `${this}`;
        if (name === 'repeat') within(size(self) * args[0], LONGEST);
        else if (isSearch) {
          const what = args[0];
          const isObject = what !== null && typeof what === 'object';
          const isPattern = isObject &&
            [Symbol.match, Symbol.split, Symbol.replace].some((symbol) => what[symbol] !== undefined);
          if (isObject && !isPattern) args[0] = `${what}`;
          within(size(self) * size(args[0]), 50 * LONGEST);
        }
        return apply(original, self, args);
      },
    }.method;
    if (name === 'toString' || name === 'valueOf') continue;
    defineProperty(wrapped, 'name', { value: name });
    defineProperty(wrapped, 'length', { value: original.length });
    defineProperty(texts, name, { value: wrapped });
  }
  for (const name of ['padStart', 'padEnd']) {
    wrap(texts, name, (_, args) => within(+args[0], LONGEST));
  }

  for (const name of Object.getOwnPropertyNames(global)) {
    if (!kept.has(name)) delete global[name];
  }
  // What is set through these is the engine's, and stays.
  for (const name of ['stackTraceLimit', 'prepareStackTrace', 'captureStackTrace']) delete Error[name];

  // Behind the global object rather than in it, so that a source of the same name hides it.
  const blockers = Object.create(Object.prototype);
  for (const name of blocked) {
    const message = `'${name}' is disabled for security reasons in this sandboxed environment`;
    Object.defineProperty(blockers, name, { value: () => { throw new TypeError(message); } });
  }
  defineProperty(blockers, '$headgate_tick', { value: tick });
  Object.setPrototypeOf(global, blockers);

  const seen = new Set([global]);
  const waiting = [roots, blockers];
  const add = (item) => { waiting[waiting.length] = item; };
  for (const name of Object.getOwnPropertyNames(global)) {
    add(global[name]);
    Object.defineProperty(global, name, { writable: false, configurable: false });
  }
  for (let at = 0; at < waiting.length; at++) {
    const item = waiting[at];
    if (item === null || (typeof item !== 'object' && typeof item !== 'function') || seen.has(item)) {
      continue;
    }
    seen.add(item);
    add(getPrototypeOf(item));
    for (const key of [...Object.getOwnPropertyNames(item), ...Object.getOwnPropertySymbols(item)]) {
      const { value, get, set } = getOwnPropertyDescriptor(item, key);
      add(value);
      add(get);
      add(set);
    }
    if (!ArrayBuffer.isView(item)) Object.freeze(item);
  }
})(this);
